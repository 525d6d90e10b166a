"use strict";
// Draws each figure when it comes near the window, in the scheme that the reader's system asks for, and in the light one on paper.
(() => {
  const drawings = JSON.parse(document.getElementById("drawings").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };
  const places = [...document.querySelectorAll("[data-figure]")];

  const onPaper = { width: 640, autosize: false, paper_bgcolor: "#fff", plot_bgcolor: "#fff" }; // within the margins of A4 and of letter

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
  places.forEach((place) => near.observe(place));

  dark.addEventListener("change", () => drawn().forEach((place) => draw(place)));
  window.addEventListener("beforeprint", () => shown().forEach((place) => draw(place, "light", onPaper)));
  window.addEventListener("afterprint", () => drawn().forEach((place) => draw(place)));
  // What was drawn and then folded away has missed changes of scheme and of size.
  for (const details of new Set(places.map((place) => place.closest("details")).filter(Boolean))) {
    details.addEventListener("toggle", () => drawn().filter((place) => details.contains(place)).forEach((place) => draw(place)));
  }

  for (const button of document.querySelectorAll("[data-png]")) {
    button.addEventListener("click", async () => {
      const place = places.find((each) => each.dataset.figure === button.dataset.png);
      if (!place.dataset.theme) await draw(place);
      const size = { width: Math.max(720, place.clientWidth), height: place.clientHeight };
      await Plotly.downloadImage(place, { format: "png", filename: button.dataset.file, scale: 2, ...size });
    });
  }
})();
