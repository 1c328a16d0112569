// One answer, token by token: the choice of a problem, its text colored by expert, a legend, and the details of a cell.
"use strict";

class Answers {
  constructor(data, ranks) {
    this.data = data;
    this.cells = new AnswerCells(data, ranks);
    this.layer = data.start;
    this.token = 0;
    this.chosenExpert = null;
    // The layer under the pointer, if it is not the chosen one.
    this.hovered = null;
    for (const name of ["search", "problem", "show", "layer", "layer-name", "legend", "detail", "text", "matrix"]) {
      this[name.replace("-n", "N") + "Element"] = document.getElementById("answer-" + name);
    }
    this.matrix = new AnswerMatrix(this.matrixElement, this.cells);
    this.listen();
    this.findProblems(String(data.first));
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
    const problem = await this.cells.read(number);
    if (this.number !== number) return;
    this.cells.problem = problem;
    this.token = Math.min(problem.generated, problem.tokens.length - 1);
    this.chosenExpert = null;
    this.matrixElement.scrollTop = 0;
    this.writeText();
    this.show();
    this.reveal(this.token);
  }

  // ---- drawing

  show() {
    if (!this.cells.problem) return;
    this.hovered = null;
    this.layerElement.value = this.layer;
    this.layerNameElement.textContent = this.data.layers[this.layer];
    this.layerElement.setAttribute("aria-valuetext", "layer " + this.data.layers[this.layer]);
    this.paintText();
    this.writeLegend();
    this.matrix.draw(this);
    this.writeDetail();
  }

  writeText() {
    const { tokens, generated, recorded } = this.cells.problem;
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
      const marks = this.cells.overlay === null ? undefined : this.cells.marks(token, this.layer);
      const experts = this.cells.experts(token, this.layer);
      if (marks) {
        const share = marks.filter((mark) => mark === "right" || mark === "hit").length / marks.length;
        const worst = ["demand-loaded", "missed", "late"].find((mark) => marks.includes(mark));
        span.style.background = worst
          ? "color-mix(in oklab, " + this.cells.markColor(worst) + " " + Math.round(22 + 33 * (1 - share)) + "%, transparent)"
          : "color-mix(in oklab, " + pageColor("hit") + " 55%, transparent)";
      } else {
        span.style.background = marks === null || !experts.length ? "none" : this.cells.color(experts[0], this.layer);
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
    const count = this.cells.problem.tokens.length;
    if (this.cells.overlay === null) {
      const counts = new Map();
      for (let token = 0; token < count; token++) {
        const first = this.cells.experts(token, this.layer)[0];
        if (first !== undefined) counts.set(first, (counts.get(first) || 0) + 1);
      }
      const ordered = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
      for (const [expert, tokens] of ordered.slice(0, 12)) {
        const percent = Math.round((100 * tokens) / count) || "<1";
        chip(this.cells.color(expert, this.layer), "expert " + expert + ": " + percent + "%", expert);
      }
      if (ordered.length > 12) chip("transparent", ordered.length - 12 + " more experts");
    } else {
      const tally = (layers) => {
        const found = new Map();
        for (let token = 0; token < count; token++) {
          for (const layer of layers) for (const mark of this.cells.marks(token, layer) || []) found.set(mark, (found.get(mark) || 0) + 1);
        }
        return found;
      };
      const share = (found, mark) => {
        const all = [...found.values()].reduce((a, b) => a + b, 0);
        return Math.round((100 * (found.get(mark) || 0)) / all) + "%";
      };
      const here = tally([this.layer]);
      const all = tally([...this.data.layers.keys()]);
      const names = this.data.overlays[this.cells.overlay].kind === "cache" ? AnswerCells.OUTCOMES.slice(1) : ["right", "missed"];
      if (!all.size) chip("transparent", "There are no results for this problem: choose another.");
      for (const mark of all.size ? names : []) {
        const text = (here.size ? share(here, mark) + " at this layer, " : "") + share(all, mark) + " in this answer";
        chip(this.cells.markColor(mark), mark + " " + text);
      }
    }
    this.legendElement.replaceChildren(...chips);
  }

  writeDetail() {
    const { tokens, positions, generated, arrays } = this.cells.problem;
    const [token, layer] = [this.token, this.layer];
    const title = document.createElement("strong");
    title.textContent = "“" + tokens[token].replace(/\n/g, "⏎") + "”";
    const phase = generated === tokens.length ? "" : token < generated ? " (prompt)" : " (generated)";
    const parts = [title, "token " + positions[token] + phase + ", layer " + this.data.layers[layer] + ":"];
    parts.push(arrays.weights ? "experts and weights" : "experts");
    const marks = this.cells.marks(token, layer);
    const at = this.cells.place(token, layer);
    this.cells.experts(token, layer).forEach((expert, rank) => {
      const part = document.createElement("span");
      part.className = "expert";
      const box = document.createElement("i");
      box.style.background = marks ? this.cells.markColor(marks[rank]) : this.cells.color(expert, layer);
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
    if (this.cells.overlay !== null && this.data.overlays[this.cells.overlay].kind === "prediction" && marks) {
      const predicted = [...arrays.results[this.cells.overlay].slice(at, at + this.data.k)];
      const wasted = predicted.filter((expert) => !this.cells.experts(token, layer).includes(expert));
      if (wasted.length) parts.push("predicted but not chosen: " + wasted.join(", "));
    }
    if (this.cells.overlay !== null && !marks) parts.push("no result for this token and layer");
    this.detailElement.replaceChildren(...parts.flatMap((part) => [part, " "]));
  }

  // ---- events

  // Shows a cell: the whole answer only if the layer changes.
  point(token, layer) {
    if (token < 0 || token >= this.cells.problem.tokens.length) return;
    const isSameLayer = layer < 0 || layer >= this.data.layers.length || layer === this.layer;
    this.spans[this.token].classList.remove("current");
    this.token = token;
    this.spans[token].classList.add("current");
    this.hovered = null;
    if (isSameLayer) {
      this.matrix.draw(this);
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
    this.matrix.reveal(token);
  }

  listen() {
    this.searchElement.addEventListener("input", () => this.findProblems());
    this.problemElement.addEventListener("change", () => this.choose(Number(this.problemElement.value)));
    this.showElement.addEventListener("change", () => {
      this.cells.overlay = Number(this.showElement.value) < 0 ? null : Number(this.showElement.value);
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
      this.matrix.reveal(token);
    };
    this.textElement.addEventListener("pointerover", over);
    this.textElement.addEventListener("click", over);
    this.matrixElement.addEventListener("scroll", () => requestAnimationFrame(() => this.cells.problem && this.matrix.draw(this)));
    this.matrixElement.addEventListener("pointermove", (event) => {
      if (!this.cells.problem) return;
      const { token, layer, isHeader } = this.matrix.cellAt(event);
      if (isHeader || layer < 0 || layer >= this.data.layers.length || token < 0) return;
      this.hover(token, layer);
    });
    this.matrixElement.addEventListener("click", (event) => {
      if (!this.cells.problem) return;
      const { token, layer, isHeader } = this.matrix.cellAt(event);
      this.chosenExpert = null;
      if (layer >= 0 && layer < this.data.layers.length) this.layer = layer;
      if (!isHeader && token >= 0 && token < this.cells.problem.tokens.length) this.token = token;
      this.show();
      this.reveal(this.token);
    });
    this.matrixElement.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || !this.cells.problem) return;
      event.preventDefault();
      const token = Math.min(Math.max(this.token + step[0], 0), this.cells.problem.tokens.length - 1);
      const layer = Math.min(Math.max(this.layer + step[1], 0), this.data.layers.length - 1);
      this.point(token, layer);
      this.reveal(token);
    });
    window.addEventListener("themechange", () => this.show());
    new ResizeObserver(() => this.cells.problem && this.matrix.draw(this)).observe(this.matrixElement);
  }

  // The pointer shows the details of a cell of any layer; the text keeps the chosen one.
  hover(token, layer) {
    if (token >= this.cells.problem.tokens.length || (token === this.token && layer === (this.hovered ?? this.layer))) return;
    this.hovered = layer === this.layer ? null : layer;
    const chosen = this.layer;
    this.spans[this.token].classList.remove("current");
    this.token = token;
    this.spans[token].classList.add("current");
    this.matrix.draw(this);
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
