// What is known of each cell of an answer, a token at a layer: its experts, what was predicted, and what a cache did.
"use strict";

class AnswerCells {
  static OUTCOMES = ["unknown", "hit", "late", "demand-loaded"];

  constructor(data, ranks) {
    this.data = data;
    this.ranks = ranks;
    // The problem that is shown, and the evaluation or simulation that `marks` is of; null for none.
    this.problem = null;
    this.overlay = null;
  }

  // Resolves to the problem with its arrays.
  async read(number) {
    const problem = this.data.problems[number];
    problem.arrays ??= this.unpacked(problem, await unpack(problem.data));
    return problem;
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
      return found.every((code) => code === 0) ? null : found.map((code) => AnswerCells.OUTCOMES[code]);
    }
    if (found[0] >= this.data.experts) return null;
    return this.experts(token, layer).map((expert) => (found.includes(expert) ? "right" : "missed"));
  }

  color(expert, layer) {
    return expertColor(this.ranks[layer * this.data.experts + expert], document.documentElement.dataset.theme === "dark");
  }

  markColor(mark) {
    return pageColor({ right: "hit", hit: "hit", late: "late", missed: "demand", "demand-loaded": "demand" }[mark] || "line");
  }
}
