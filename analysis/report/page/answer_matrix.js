// The matrix of an answer: a row for each token, a column for each layer, on a canvas.
"use strict";

class AnswerMatrix {
  static ROW = 18;
  static HEADER = 20;

  constructor(element, cells) {
    this.element = element;
    this.cells = cells;
    this.canvas = element.querySelector("canvas");
  }

  // The matrix is drawn for the rows in view only, so that it can be as long as the answer.
  draw({ token: current, layer: chosen, hovered, chosenExpert }) {
    const { ROW, HEADER } = AnswerMatrix;
    const { data, problem, overlay } = this.cells;
    const layers = data.layers.length;
    const count = problem.tokens.length;
    const holder = this.element;
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
    for (const mark of ["right", "missed", ...AnswerCells.OUTCOMES]) markColors[mark] = this.cells.markColor(mark);
    for (let token = first; token < last; token++) {
      const y = HEADER + token * ROW - top;
      if (token === current) {
        paint.fillStyle = faint;
        paint.fillRect(0, y, full, ROW);
      }
      paint.fillStyle = token < problem.generated && problem.generated < count ? soft : ink;
      paint.textAlign = "left";
      paint.save();
      paint.beginPath();
      paint.rect(0, y, label - 4, ROW);
      paint.clip();
      paint.fillText(problem.tokens[token].replace(/\n/g, "⏎").replace(/ /g, "␣") || "·", 2, y + ROW / 2);
      paint.restore();
      paint.textAlign = "center";
      for (let layer = 0; layer < layers; layer++) {
        const x = label + layer * cell;
        const experts = this.cells.experts(token, layer);
        const isDim = chosenExpert !== null && (layer !== chosen || !experts.includes(chosenExpert));
        paint.globalAlpha = isDim ? 0.2 : 1;
        const [w, h] = [cell > 6 ? cell - 1 : cell, ROW - 1];
        if (overlay === null) {
          if (!experts.length) continue;
          paint.fillStyle = this.cells.color(experts[0], layer);
          paint.fillRect(x, y, w, h);
          if (cell >= (data.experts > 100 ? 21 : data.experts > 10 ? 15 : 10)) {
            paint.fillStyle = ink;
            paint.fillText(experts[0], x + w / 2, y + ROW / 2);
          }
        } else {
          const marks = this.cells.marks(token, layer);
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
      if (layer % every && layer !== chosen) continue;
      if (layer !== chosen && Math.abs(layer - chosen) < every && every > 1) continue;
      paint.fillStyle = layer === chosen ? ink : soft;
      paint.font = (layer === chosen ? "bold " : "") + "11px system-ui, sans-serif";
      paint.fillText(data.layers[layer], label + layer * cell + cell / 2, HEADER / 2);
    }
    paint.font = "11px system-ui, sans-serif";
    paint.textAlign = "left";
    paint.fillStyle = soft;
    paint.fillText("token / layer", 2, HEADER / 2);
    paint.strokeStyle = ink;
    paint.strokeRect(label + chosen * cell - 0.5, 0.5, cell, height - 1);
    if (hovered !== null) {
      paint.lineWidth = 2;
      paint.strokeRect(label + hovered * cell - 0.5, HEADER + current * ROW - top - 0.5, cell, ROW);
    }
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { label, cell } = this.geometry;
    const token = Math.floor((event.clientY - box.top - AnswerMatrix.HEADER + this.element.scrollTop) / AnswerMatrix.ROW);
    const layer = Math.floor((event.clientX - box.left - label) / cell);
    return { token, layer, isHeader: event.clientY - box.top < AnswerMatrix.HEADER };
  }

  // Scrolls the matrix, never the page, if the row of a token is out of view.
  reveal(token) {
    const { ROW, HEADER } = AnswerMatrix;
    const [top, height] = [token * ROW, this.element.clientHeight - HEADER];
    const scroll = this.element.scrollTop;
    if (top < scroll || top + ROW > scroll + height) this.element.scrollTop = top - height / 2;
  }
}
