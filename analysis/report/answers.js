// One answer, token by token: its text colored by expert, and the matrix of experts by token and layer.
"use strict";

// Hues and lightness of the busiest experts of a layer: neighbors differ in both, also for the color-blind.
const FIRST_COLORS = [
  [250, 0.8], [60, 0.86], [150, 0.76], [345, 0.84], [105, 0.93], [300, 0.74], [200, 0.9], [28, 0.76], [130, 0.88], [275, 0.7],
  [85, 0.78], [0, 0.72],
];

function expertColor(rank, isDark) {
  let [hue, lightness, chroma] = [...(FIRST_COLORS[rank] || []), 0.11];
  if (rank >= FIRST_COLORS.length) {
    // The golden angle spreads any number of hues; lightness and chroma change faster than they do.
    [hue, lightness, chroma] = [(rank * 137.508) % 360, [0.88, 0.8, 0.72][rank % 3], rank % 2 ? 0.09 : 0.05];
  }
  return "oklch(" + (isDark ? lightness - 0.43 : lightness).toFixed(3) + " " + chroma + " " + hue.toFixed(1) + ")";
}

class Answers {
  static ROW = 18;
  static HEADER = 20;
  static OUTCOMES = ["unknown", "hit", "late", "demand-loaded"];

  constructor(data, ranks) {
    this.data = data;
    this.ranks = ranks;
    this.layer = data.start;
    this.token = 0;
    this.overlay = null;
    this.chosenExpert = null;
    // The layer under the pointer, if it is not the chosen one.
    this.hovered = null;
    for (const name of ["search", "problem", "show", "layer", "layer-name", "legend", "detail", "text", "matrix"]) {
      this[name.replace("-n", "N") + "Element"] = document.getElementById("answer-" + name);
    }
    this.canvas = this.matrixElement.querySelector("canvas");
    this.listen();
    this.findProblems(String(data.first));
  }

  get isDark() {
    return document.documentElement.dataset.theme === "dark";
  }

  // ---- the problem

  findProblems(wanted = this.problemElement.value) {
    const words = this.searchElement.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.problemElement.replaceChildren();
    this.data.problems.forEach((problem, number) => {
      problem.words ??= (problem.domain + " " + problem.prompt + " " + problem.tokens.join("")).toLowerCase();
      if (!words.every((word) => problem.words.includes(word))) return;
      const option = document.createElement("option");
      option.value = number;
      const begins = (problem.prompt || problem.tokens.join("")).replace(/\s+/g, " ").trim();
      option.textContent = problem.domain + ": " + (begins.length > 80 ? begins.slice(0, 80) + "…" : begins);
      this.problemElement.append(option);
    });
    const found = this.problemElement.options.length;
    this.problemElement.disabled = found === 0;
    if (!found) {
      this.detailElement.textContent = "No problem on this page has these words.";
      return;
    }
    if ([...this.problemElement.options].some((option) => option.value === wanted)) this.problemElement.value = wanted;
    const chosen = Number(this.problemElement.value);
    if (chosen !== this.number) this.choose(chosen);
  }

  async choose(number) {
    this.number = number;
    const problem = this.data.problems[number];
    problem.arrays ??= this.unpacked(problem, await unpack(problem.data));
    if (this.number !== number) return;
    this.problem = problem;
    this.token = Math.min(problem.generated, problem.tokens.length - 1);
    this.chosenExpert = null;
    this.matrixElement.scrollTop = 0;
    this.writeText();
    this.show();
  }

  unpacked(problem, bytes) {
    const { layers, k, wide } = this.data;
    const size = problem.tokens.length * layers.length * k;
    let at = 0;
    const take = (count, isWide) => {
      const part = bytes.slice(at, at + count * (isWide ? 2 : 1));
      at += part.length;
      return isWide ? new Uint16Array(part.buffer) : part;
    };
    const arrays = { ids: take(size, wide) };
    if (this.data.weightMax > 0) arrays.weights = take(size, false);
    if (this.data.marginMax > 0) arrays.margins = take(size / k, false);
    arrays.results = problem.marks.map((has) => (has ? take(size, wide) : null));
    return arrays;
  }

  // ---- what is known of a cell

  place(token, layer) {
    return (token * this.data.layers.length + layer) * this.data.k;
  }

  experts(token, layer) {
    const at = this.place(token, layer);
    return [...this.problem.arrays.ids.slice(at, at + this.data.k)].filter((expert) => expert < this.data.experts);
  }

  // For each expert of a cell, how it fared: right or missed, or what the cache did. Null if nothing is known.
  marks(token, layer) {
    const results = this.overlay === null ? null : this.problem.arrays.results[this.overlay];
    if (!results) return null;
    const at = this.place(token, layer);
    const found = [...results.slice(at, at + this.data.k)];
    if (this.data.overlays[this.overlay].kind === "cache") {
      return found.every((code) => code === 0) ? null : found.map((code) => Answers.OUTCOMES[code]);
    }
    if (found[0] >= this.data.experts) return null;
    return this.experts(token, layer).map((expert) => (found.includes(expert) ? "right" : "missed"));
  }

  color(expert, layer) {
    return expertColor(this.ranks[layer * this.data.experts + expert], this.isDark);
  }

  markColor(mark) {
    return pageColor({ right: "hit", hit: "hit", late: "late", missed: "demand", "demand-loaded": "demand" }[mark] || "line");
  }

  // ---- drawing

  show() {
    if (!this.problem) return;
    this.hovered = null;
    this.layerElement.value = this.layer;
    this.layerNameElement.textContent = this.data.layers[this.layer];
    this.layerElement.setAttribute("aria-valuetext", "layer " + this.data.layers[this.layer]);
    this.paintText();
    this.writeLegend();
    this.drawMatrix();
    this.writeDetail();
  }

  writeText() {
    const { tokens, generated, recorded } = this.problem;
    const parts = [];
    const heading = (text) => {
      const element = document.createElement("div");
      element.className = "part";
      element.textContent = text;
      parts.push(element);
    };
    const count = tokens.length;
    const note = recorded > count ? " (" + count + " of " + recorded + " recorded tokens are shown)" : "";
    if (generated > 0 && generated < count) heading("Prompt" + note);
    else heading((generated === 0 ? "Generated" : "Text") + note);
    this.spans = tokens.map((text, token) => {
      if (token === generated && token > 0) heading("Generated");
      const span = document.createElement("span");
      span.dataset.token = token;
      // A line break is shown as a sign and breaks the line after it.
      span.textContent = text.replace(/\n/g, "⏎\n") || "·";
      parts.push(span);
      return span;
    });
    this.textElement.replaceChildren(...parts);
    this.textElement.scrollTop = 0;
  }

  paintText() {
    this.spans.forEach((span, token) => {
      const marks = this.overlay === null ? undefined : this.marks(token, this.layer);
      const experts = this.experts(token, this.layer);
      if (marks) {
        const share = marks.filter((mark) => mark === "right" || mark === "hit").length / marks.length;
        const worst = ["demand-loaded", "missed", "late"].find((mark) => marks.includes(mark));
        span.style.background = worst
          ? "color-mix(in oklab, " + this.markColor(worst) + " " + Math.round(22 + 33 * (1 - share)) + "%, transparent)"
          : "color-mix(in oklab, " + pageColor("hit") + " 55%, transparent)";
      } else {
        span.style.background = marks === null || !experts.length ? "none" : this.color(experts[0], this.layer);
      }
      span.classList.toggle("dim", this.chosenExpert !== null && !experts.includes(this.chosenExpert));
      span.classList.toggle("current", token === this.token);
    });
  }

  writeLegend() {
    const chips = [];
    const chip = (color, text, expert) => {
      const element = document.createElement(expert === undefined ? "span" : "button");
      if (expert !== undefined) {
        element.type = "button";
        element.setAttribute("aria-pressed", String(expert === this.chosenExpert));
        element.addEventListener("click", () => {
          this.chosenExpert = this.chosenExpert === expert ? null : expert;
          this.show();
        });
      }
      element.className = "chip";
      const box = document.createElement("i");
      box.style.background = color;
      element.append(box, text);
      chips.push(element);
    };
    const count = this.problem.tokens.length;
    if (this.overlay === null) {
      const counts = new Map();
      for (let token = 0; token < count; token++) {
        const first = this.experts(token, this.layer)[0];
        if (first !== undefined) counts.set(first, (counts.get(first) || 0) + 1);
      }
      const ordered = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
      for (const [expert, tokens] of ordered.slice(0, 12)) {
        const percent = Math.round((100 * tokens) / count) || "<1";
        chip(this.color(expert, this.layer), "expert " + expert + ": " + percent + "%", expert);
      }
      if (ordered.length > 12) chip("transparent", ordered.length - 12 + " more experts");
    } else {
      const tally = (layers) => {
        const found = new Map();
        for (let token = 0; token < count; token++) {
          for (const layer of layers) for (const mark of this.marks(token, layer) || []) found.set(mark, (found.get(mark) || 0) + 1);
        }
        return found;
      };
      const share = (found, mark) => {
        const all = [...found.values()].reduce((a, b) => a + b, 0);
        return Math.round((100 * (found.get(mark) || 0)) / all) + "%";
      };
      const here = tally([this.layer]);
      const all = tally([...this.data.layers.keys()]);
      const names = this.data.overlays[this.overlay].kind === "cache" ? Answers.OUTCOMES.slice(1) : ["right", "missed"];
      if (!all.size) chip("transparent", "There are no results for this problem: choose another.");
      for (const mark of all.size ? names : []) {
        const text = (here.size ? share(here, mark) + " at this layer, " : "") + share(all, mark) + " in this answer";
        chip(this.markColor(mark), mark + " " + text);
      }
    }
    this.legendElement.replaceChildren(...chips);
  }

  writeDetail() {
    const { tokens, positions, generated, arrays } = this.problem;
    const [token, layer] = [this.token, this.layer];
    const title = document.createElement("strong");
    title.textContent = "“" + tokens[token].replace(/\n/g, "⏎") + "”";
    const phase = generated === tokens.length ? "" : token < generated ? " (prompt)" : " (generated)";
    const parts = [title, "token " + positions[token] + phase + ", layer " + this.data.layers[layer] + ":"];
    parts.push(arrays.weights ? "experts and weights" : "experts");
    const marks = this.marks(token, layer);
    const at = this.place(token, layer);
    this.experts(token, layer).forEach((expert, rank) => {
      const part = document.createElement("span");
      part.className = "expert";
      const box = document.createElement("i");
      box.style.background = marks ? this.markColor(marks[rank]) : this.color(expert, layer);
      let text = String(expert);
      if (arrays.weights) text += " " + ((arrays.weights[at + rank] / 255) * this.data.weightMax).toFixed(2);
      if (marks) text += " " + marks[rank];
      part.append(box, text);
      parts.push(part);
    });
    if (arrays.margins) {
      const share = arrays.margins[at / this.data.k] / 255;
      parts.push("margin to the next " + (share * share * this.data.marginMax).toFixed(2));
    }
    if (this.overlay !== null && this.data.overlays[this.overlay].kind === "prediction" && marks) {
      const predicted = [...arrays.results[this.overlay].slice(at, at + this.data.k)];
      const wasted = predicted.filter((expert) => !this.experts(token, layer).includes(expert));
      if (wasted.length) parts.push("predicted but not chosen: " + wasted.join(", "));
    }
    if (this.overlay !== null && !marks) parts.push("no result for this token and layer");
    this.detailElement.replaceChildren(...parts.flatMap((part) => [part, " "]));
  }

  // The matrix is drawn for the rows in view only, so that it can be as long as the answer.
  drawMatrix() {
    const { ROW, HEADER } = Answers;
    const layers = this.data.layers.length;
    const count = this.problem.tokens.length;
    const holder = this.matrixElement;
    const [width, height] = [holder.clientWidth, holder.clientHeight];
    if (!width || !height) return;
    const label = Math.min(110, Math.round(width * 0.24));
    const cell = Math.max(4, Math.min(64, Math.floor((width - label) / layers)));
    this.geometry = { label, cell };
    const full = Math.max(width, label + cell * layers);
    holder.firstElementChild.style.height = HEADER + ROW * count + "px";
    holder.firstElementChild.style.width = full + "px";
    const scale = Math.min(2, window.devicePixelRatio || 1);
    this.canvas.width = full * scale;
    this.canvas.height = height * scale;
    this.canvas.style.width = full + "px";
    this.canvas.style.height = height + "px";
    const paint = this.canvas.getContext("2d");
    paint.scale(scale, scale);
    paint.font = "11px system-ui, sans-serif";
    paint.textBaseline = "middle";
    const [ink, soft, faint, card] = ["ink", "soft", "line", "card"].map(pageColor);
    const top = holder.scrollTop;
    const first = Math.max(0, Math.floor(top / ROW));
    const last = Math.min(count, first + Math.ceil(height / ROW) + 1);
    // Colors are looked up once, not for every cell.
    const markColors = {};
    for (const mark of ["right", "missed", ...Answers.OUTCOMES]) markColors[mark] = this.markColor(mark);
    for (let token = first; token < last; token++) {
      const y = HEADER + token * ROW - top;
      if (token === this.token) {
        paint.fillStyle = faint;
        paint.fillRect(0, y, full, ROW);
      }
      paint.fillStyle = token < this.problem.generated && this.problem.generated < count ? soft : ink;
      paint.textAlign = "left";
      paint.save();
      paint.beginPath();
      paint.rect(0, y, label - 4, ROW);
      paint.clip();
      paint.fillText(this.problem.tokens[token].replace(/\n/g, "⏎").replace(/ /g, "␣") || "·", 2, y + ROW / 2);
      paint.restore();
      paint.textAlign = "center";
      for (let layer = 0; layer < layers; layer++) {
        const x = label + layer * cell;
        const experts = this.experts(token, layer);
        const isDim = this.chosenExpert !== null && (layer !== this.layer || !experts.includes(this.chosenExpert));
        paint.globalAlpha = isDim ? 0.2 : 1;
        const [w, h] = [cell > 6 ? cell - 1 : cell, ROW - 1];
        if (this.overlay === null) {
          if (!experts.length) continue;
          paint.fillStyle = this.color(experts[0], layer);
          paint.fillRect(x, y, w, h);
          if (cell >= (this.data.experts > 100 ? 21 : this.data.experts > 10 ? 15 : 10)) {
            paint.fillStyle = ink;
            paint.fillText(experts[0], x + w / 2, y + ROW / 2);
          }
        } else {
          const marks = this.marks(token, layer);
          paint.fillStyle = card;
          paint.fillRect(x, y, w, h);
          if (marks) {
            // The best first, so that a cell reads as a bar.
            const order = ["right", "hit", "late", "missed", "demand-loaded", "unknown"];
            marks.sort((a, b) => order.indexOf(a) - order.indexOf(b));
            marks.forEach((mark, place) => {
              paint.fillStyle = markColors[mark];
              const from = Math.round((place * w) / marks.length);
              paint.fillRect(x + from, y, Math.round(((place + 1) * w) / marks.length) - from, h);
            });
          }
        }
      }
      paint.globalAlpha = 1;
    }
    paint.fillStyle = pageColor("paper");
    paint.fillRect(0, 0, full, HEADER);
    const every = Math.max(1, Math.ceil(22 / cell));
    for (let layer = 0; layer < layers; layer++) {
      if (layer % every && layer !== this.layer) continue;
      if (layer !== this.layer && Math.abs(layer - this.layer) < every && every > 1) continue;
      paint.fillStyle = layer === this.layer ? ink : soft;
      paint.font = (layer === this.layer ? "bold " : "") + "11px system-ui, sans-serif";
      paint.fillText(this.data.layers[layer], label + layer * cell + cell / 2, HEADER / 2);
    }
    paint.font = "11px system-ui, sans-serif";
    paint.textAlign = "left";
    paint.fillStyle = soft;
    paint.fillText("token / layer", 2, HEADER / 2);
    paint.strokeStyle = ink;
    paint.strokeRect(label + this.layer * cell - 0.5, 0.5, cell, height - 1);
    if (this.hovered !== null) {
      paint.lineWidth = 2;
      paint.strokeRect(label + this.hovered * cell - 0.5, HEADER + this.token * ROW - top - 0.5, cell, ROW);
    }
  }

  // ---- events

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { label, cell } = this.geometry;
    const token = Math.floor((event.clientY - box.top - Answers.HEADER + this.matrixElement.scrollTop) / Answers.ROW);
    const layer = Math.floor((event.clientX - box.left - label) / cell);
    return { token, layer, isHeader: event.clientY - box.top < Answers.HEADER };
  }

  // Shows a cell: the whole answer only if the layer changes.
  point(token, layer) {
    if (token < 0 || token >= this.problem.tokens.length) return;
    const isSameLayer = layer < 0 || layer >= this.data.layers.length || layer === this.layer;
    this.spans[this.token].classList.remove("current");
    this.token = token;
    this.spans[token].classList.add("current");
    this.hovered = null;
    if (isSameLayer) {
      this.drawMatrix();
      this.writeDetail();
    } else {
      this.layer = layer;
      this.show();
    }
  }

  // Scrolls only within the text and the matrix, never the page.
  reveal(token) {
    const [text, span] = [this.textElement, this.spans[token]];
    const at = span.offsetTop - text.offsetTop;
    if (at < text.scrollTop || at > text.scrollTop + text.clientHeight - 30) text.scrollTop = at - text.clientHeight / 2;
    const [top, height] = [token * Answers.ROW, this.matrixElement.clientHeight - Answers.HEADER - Answers.ROW];
    const scroll = this.matrixElement.scrollTop;
    if (top < scroll || top > scroll + height) this.matrixElement.scrollTop = top - height / 2;
  }

  listen() {
    this.searchElement.addEventListener("input", () => this.findProblems());
    this.problemElement.addEventListener("change", () => this.choose(Number(this.problemElement.value)));
    this.showElement.addEventListener("change", () => {
      this.overlay = Number(this.showElement.value) < 0 ? null : Number(this.showElement.value);
      this.chosenExpert = null;
      this.show();
    });
    this.layerElement.addEventListener("input", () => {
      this.layer = Number(this.layerElement.value);
      this.chosenExpert = null;
      this.show();
    });
    const over = (event) => {
      const token = Number(event.target.dataset.token ?? -1);
      if (token < 0 || token === this.token) return;
      this.point(token, this.layer);
      const top = token * Answers.ROW;
      const height = this.matrixElement.clientHeight - Answers.HEADER;
      const scroll = this.matrixElement.scrollTop;
      if (top < scroll || top + Answers.ROW > scroll + height) this.matrixElement.scrollTop = top - height / 2;
    };
    this.textElement.addEventListener("pointerover", over);
    this.textElement.addEventListener("click", over);
    this.matrixElement.addEventListener("scroll", () => requestAnimationFrame(() => this.problem && this.drawMatrix()));
    this.matrixElement.addEventListener("pointermove", (event) => {
      if (!this.problem) return;
      const { token, layer, isHeader } = this.cellAt(event);
      if (isHeader || layer < 0 || layer >= this.data.layers.length || token < 0) return;
      this.hover(token, layer);
    });
    this.matrixElement.addEventListener("click", (event) => {
      if (!this.problem) return;
      const { token, layer, isHeader } = this.cellAt(event);
      this.chosenExpert = null;
      if (layer >= 0 && layer < this.data.layers.length) this.layer = layer;
      if (!isHeader && token >= 0 && token < this.problem.tokens.length) this.token = token;
      this.show();
      this.reveal(this.token);
    });
    this.matrixElement.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || !this.problem) return;
      event.preventDefault();
      const token = Math.min(Math.max(this.token + step[0], 0), this.problem.tokens.length - 1);
      const layer = Math.min(Math.max(this.layer + step[1], 0), this.data.layers.length - 1);
      this.point(token, layer);
      this.reveal(token);
    });
    window.addEventListener("themechange", () => this.show());
    new ResizeObserver(() => this.problem && this.drawMatrix()).observe(this.matrixElement);
  }

  // The pointer shows the details of a cell of any layer; the text keeps the chosen one.
  hover(token, layer) {
    if (token >= this.problem.tokens.length || (token === this.token && layer === (this.hovered ?? this.layer))) return;
    this.hovered = layer === this.layer ? null : layer;
    const chosen = this.layer;
    this.spans[this.token].classList.remove("current");
    this.token = token;
    this.spans[token].classList.add("current");
    this.drawMatrix();
    this.layer = layer;
    this.writeDetail();
    this.layer = chosen;
  }
}

async function showAnswers() {
  const data = sectionData("answers");
  if (!data) return;
  if (typeof DecompressionStream === "undefined" || !data.problems.length) {
    document.getElementById("answer-detail").textContent = data.problems.length
      ? "This browser cannot decompress the answers."
      : "The trace has no problems to show.";
    return;
  }
  const ranks = new Uint16Array((await unpack(data.ranks)).buffer);
  window.answers = new Answers(data, ranks);
}

window.addEventListener("load", showAnswers);
