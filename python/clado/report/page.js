const root = document.documentElement;
const specs = JSON.parse(document.getElementById("figures").textContent);

// Auto, then the other of light and dark, then back. Figures follow by CSS variables, so nothing is drawn again.
document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme ?? (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});

const drawings = [...document.querySelectorAll("[data-figure]")].map(async (place) => {
  const options = { mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: "custom" } };
  await window.vegaEmbed(place, specs[place.dataset.figure], options);
});
Promise.all(drawings).then(
  () => { root.dataset.ready = "true"; },
  (error) => { console.error(error); root.dataset.ready = "error"; },
);
