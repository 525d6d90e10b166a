"use strict";
// Draws the figures of a page in the colours of page.css, and shows the tiles of the picked rule.
// A drawing is {data, layout}; an element's data-figure is its name.
const Figures = (() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };
  const onPaper = { width: 640, autosize: false }; // within A4 and letter
  const name = /^--[a-z]+(-\d)?$/; // of a colour, in the place of its value
  let drawings = {};
  let places = [];

  /** Makes a script of plotly.js, which the page of a report holds compressed. */
  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const load = () => new Promise((loaded) => {
    const packed = document.getElementById("plotly");
    if (packed) return loaded(unpack(packed.textContent));
    const script = document.createElement("script");
    script.addEventListener("load", loaded);
    script.src = document.body.dataset.plotly;
    document.head.append(script);
  });
  let loading = null;
  /** Loads plotly.js for the first figure. Texts are shown before, because the script takes up to a second. */
  const ready = () => loading ??= new Promise((start) => requestAnimationFrame(() => setTimeout(start))).then(load);

  const coloured = (value, style) => {
    if (typeof value === "string") return name.test(value) ? style.getPropertyValue(value) || value : value;
    if (Array.isArray(value)) return value.map((each) => coloured(each, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, style)]));
  };
  const draw = async (place, { theme = dark.matches ? "dark" : "light", ...size } = {}) => {
    await ready();
    const drawing = drawings[place.dataset.figure];
    if (!drawing || !place.isConnected) return;
    const paper = document.documentElement.dataset;
    if (theme === "light" && dark.matches) paper.print = ""; // the light colours, for paper
    const { data, layout } = coloured(drawing, getComputedStyle(document.documentElement));
    delete paper.print;
    if (place.clientWidth < 480) Object.assign(layout.legend, { font: { size: 11 }, itemwidth: 30 });
    place.dataset.theme = theme;
    await Plotly.react(place, data, { ...layout, ...size }, config);
  };
  const isShown = (place) => !place.closest(".off, details:not([open])");
  const drawn = () => places.filter((place) => place.dataset.theme && isShown(place));
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        near.unobserve(target);
        draw(target);
      }
    }
  }, { rootMargin: "800px" });

  dark.addEventListener("change", () => drawn().forEach((place) => draw(place)));
  window.addEventListener("beforeprint", () => places.filter(isShown).forEach((place) => draw(place, { theme: "light", ...onPaper })));
  window.addEventListener("afterprint", () => drawn().forEach((place) => draw(place)));
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-png]");
    if (!button) return;
    const place = button.closest(".panel, figure").querySelector("[data-figure]");
    if (!place.dataset.theme) await draw(place);
    const size = { width: Math.max(720, place.clientWidth), height: place.clientHeight };
    await Plotly.downloadImage(place, { format: "png", filename: button.dataset.png, scale: 2, ...size });
  });

  /** Draws the figures of the page, each when it is near the visible part. */
  const show = (newDrawings) => {
    near.disconnect();
    drawings = newDrawings;
    places.forEach((place) => place.isConnected || place.dataset.theme === undefined || Plotly.purge(place));
    places = [...document.querySelectorAll("[data-figure]")];
    places.forEach((place) => near.observe(place));
    if (places.length) (window.requestIdleCallback || setTimeout)(ready); // a print does not wait for the script
  };

  /** Shows what is picked in an overview: the tiles of a rule, or a panel of the large figure. */
  const pick = (root, { rule, panel }) => {
    const rows = [...root.querySelectorAll("tr[data-rule]")];
    if (rows.some((row) => row.dataset.rule === rule)) {
      for (const row of rows) {
        const isHere = row.dataset.rule === rule;
        row.classList.toggle("here", isHere);
        row.querySelector("button").setAttribute("aria-pressed", String(isHere));
      }
      root.querySelectorAll("[data-tiles]").forEach((each) => each.classList.toggle("off", each.dataset.tiles !== rule));
    }
    const buttons = [...root.querySelectorAll("[data-panel]")];
    if (buttons.some((button) => button.dataset.panel === panel)) {
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.panel === panel)));
      root.querySelectorAll(".panel").forEach((each) => each.classList.toggle("off", each.dataset.of !== panel));
      root.querySelectorAll(".panel:not(.off) [data-figure]").forEach((place) => draw(place));
    }
  };
  document.addEventListener("click", (event) => {
    const picked = event.target.closest("tr[data-rule], [data-panel]");
    const root = event.target.closest(".overview");
    if (!picked || !root) return;
    pick(root, picked.dataset);
    document.dispatchEvent(new CustomEvent("picked", { detail: picked.dataset }));
  });
  return { show, pick };
})();

const embedded = document.getElementById("drawings"); // only in the page of a report
if (embedded) Figures.show(JSON.parse(embedded.textContent));
