// Colors of experts by the rank of their load: hundreds that differ, on which text can be read in light and dark.
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
