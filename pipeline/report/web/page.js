"use strict";
// Draws figures in the colour scheme of the reader's system, and in the light scheme on paper.
// drawings[name] is {light, dark}, each {data, layout}; an element's data-figure is the name.
const Figures = (() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };
  const onPaper = { width: 640, autosize: false, paper_bgcolor: "#fff", plot_bgcolor: "#fff" }; // within A4 and letter
  let drawings = {};
  let places = [];

  const draw = (place, theme = dark.matches ? "dark" : "light", size = {}) => {
    const { data, layout } = structuredClone(drawings[place.dataset.figure][theme]);
    Object.assign(layout, size);
    place.dataset.theme = theme;
    return Plotly.react(place, data, layout, config);
  };
  const shown = () => places.filter((place) => !place.closest("details:not([open])"));
  const drawn = () => shown().filter((place) => place.dataset.theme);
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        near.unobserve(target);
        draw(target);
      }
    }
  }, { rootMargin: "800px" });

  dark.addEventListener("change", () => drawn().forEach((place) => draw(place)));
  window.addEventListener("beforeprint", () => shown().forEach((place) => draw(place, "light", onPaper)));
  window.addEventListener("afterprint", () => drawn().forEach((place) => draw(place)));
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-png]");
    if (!button) return;
    const place = button.closest("figure").querySelector("[data-figure]");
    if (!place.dataset.theme) await draw(place);
    const size = { width: Math.max(720, place.clientWidth), height: place.clientHeight };
    await Plotly.downloadImage(place, { format: "png", filename: button.dataset.png, scale: 2, ...size });
  });

  /** Draws the figures inside `root`: all "now", or each when it is "near" the visible part. */
  return (root, newDrawings, when) => {
    near.disconnect();
    places.forEach((place) => place.isConnected || Plotly.purge(place));
    drawings = newDrawings;
    places = [...root.querySelectorAll("[data-figure]")];
    places.forEach((place) => (when === "now" ? draw(place) : near.observe(place)));
    // A drawing in closed details has missed changes of the scheme and the size.
    for (const details of new Set(places.map((place) => place.closest("details")).filter(Boolean))) {
      details.addEventListener("toggle", () => drawn().filter((place) => details.contains(place)).forEach((place) => draw(place)));
    }
  };
})();

const embedded = document.getElementById("drawings"); // only in the page of a report
if (embedded) Figures(document, JSON.parse(embedded.textContent), "near");
