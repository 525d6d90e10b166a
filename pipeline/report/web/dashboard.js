"use strict";
// The address is the only state of the page. Buttons change the address, and the marks, the list
// and the figures follow it. Each response of the server starts a timer for the next request.
(() => {
  const every = 1000 * Number(document.body.dataset.every);
  const patience = 1000 * Number(document.body.dataset.patience); // a request without a response is repeated after this time
  const $ = (id) => document.getElementById(id);
  const shown = { search: null, version: "", boxes: "", list: "" };
  let looks = 0, timer = 0, paused = false, typing = 0, focusHeading = false;

  const query = () => new URLSearchParams(location.search);
  const boxes = () => [...document.querySelectorAll("#runs [role=checkbox]")];
  const isChecked = (box) => box.getAttribute("aria-checked") === "true";

  const go = (search, { replace = false } = {}) => {
    history[replace ? "replaceState" : "pushState"](null, "", search || location.pathname);
    mark();
    look(false);
  };
  const change = (name, value, how) => {
    const params = query();
    value ? params.set(name, value) : params.delete(name);
    go(params.size ? `?${params}` : "", how);
  };
  const pick = (ids) => change("runs", ids.join(".") || "none");

  const mark = () => {
    const params = query();
    for (const button of document.querySelectorAll("[data-change]")) {
      const { change: name, to } = button.dataset;
      const first = document.querySelector(`[data-change="${name}"]`).dataset.to;
      button.setAttribute("aria-pressed", String((params.get(name) || first) === to));
    }
    if (params.has("runs")) {
      const ids = params.get("runs").split(".");
      boxes().forEach((box) => box.setAttribute("aria-checked", String(ids.includes(box.dataset.run))));
    }
    count();
    if (document.activeElement !== $("text")) $("text").value = params.get("text") || "";
  };
  const count = () => {
    const all = boxes();
    $("picked").textContent = all.length ? `Runs: ${all.filter(isChecked).length} of ${all.length} picked` : "Runs";
  };

  const get = async (path, more) => {
    const params = query();
    for (const [name, value] of Object.entries(more)) if (value) params.set(name, value);
    const response = await fetch(`${path}?${params}`, { signal: AbortSignal.timeout(patience) });
    if (response.status === 204) return null;
    return response.headers.get("Content-Type").startsWith("application/json") ? response.json() : response.text();
  };

  const put = (element, html) => {
    const focused = element.contains(document.activeElement) ? document.activeElement.id : "";
    element.innerHTML = html;
    if (focused) $(focused)?.focus({ preventScroll: true }); // the keyboard focus stays
  };

  const showList = async (mine, again) => {
    const html = await get("/list", { look: again ? "1" : "" });
    if (mine !== looks || html === shown.list) return;
    shown.list = html;
    put($("list"), html);
  };

  const showStudy = async (mine) => {
    const search = location.search;
    const study = await get("/study", { seen: search === shown.search ? shown.version : "" });
    if (mine !== looks || study === null) return;
    shown.search = search;
    shown.version = study.version;
    $("study").textContent = study.title;
    document.title = study.window;
    $("choose").hidden = !study.boxes;
    if (study.boxes !== shown.boxes) {
      shown.boxes = study.boxes;
      put($("runs"), study.boxes);
    }
    boxes().forEach((box) => box.setAttribute("aria-checked", String(study.picked.includes(box.dataset.run))));
    count();
    $("figures").innerHTML = study.html;
    Figures($("figures"), study.drawings, "now");
    if (focusHeading) $("study").focus();
    focusHeading = false;
  };

  const look = async (again) => {
    const mine = ++looks;
    clearTimeout(timer);
    const results = await Promise.allSettled([showList(mine, again), showStudy(mine)]);
    if (mine !== looks || paused) return;
    const isLost = results.some((each) => each.status === "rejected");
    timer = setTimeout(look, isLost ? Math.min(every, 1000) : every, true);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-change], [data-run], [data-pick], #pause");
    if (button?.id === "pause") {
      paused = !paused;
      button.setAttribute("aria-pressed", String(paused));
      paused ? clearTimeout(timer) : look(true);
    } else if (button?.dataset.change) change(button.dataset.change, button.dataset.to);
    else if (button?.dataset.pick) pick(button.dataset.pick === "all" ? boxes().map((box) => box.dataset.run) : []);
    else if (button?.dataset.run) {
      pick(boxes().filter((box) => isChecked(box) !== (box === button)).map((box) => box.dataset.run));
    }
    const link = event.target.closest("#list a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return; // these keys open another window
    event.preventDefault();
    if (link.closest("tr.here")) $("study").focus();
    else {
      focusHeading = Boolean(link.closest("tbody"));
      go(link.getAttribute("href"));
    }
  });
  $("text").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => change("text", $("text").value.trim()), 300);
  });
  window.addEventListener("popstate", () => {
    $("text").value = query().get("text") || "";
    mark();
    look(false);
  });
  mark();
  look(true);
})();
