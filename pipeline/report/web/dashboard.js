"use strict";
// The address is the only state of the page. Buttons change the address, and the marks, the list
// and the studies follow it. Each response of the server starts a timer for the next request.
(() => {
  const every = 1000 * Number(document.body.dataset.every);
  const patience = 1000 * Number(document.body.dataset.patience); // a request without a response is repeated after this time
  const $ = (id) => document.getElementById(id);
  const columns = [...document.querySelectorAll(".column")].map((element, index) => (
    { element, second: index ? "1" : "", prefix: index ? "beside_" : "", search: null, version: "", drawings: {}, study: "", family: "" }
  ));
  let list = null, looks = 0, timer = 0, paused = false, typing = 0, focusHeading = false;

  const query = () => new URLSearchParams(location.search);
  const boxes = (root) => [...root.querySelectorAll("[role=checkbox]")];
  const isChecked = (box) => box.getAttribute("aria-checked") === "true";
  const idOf = (box) => box.closest("tr").dataset.run;
  const columnOf = (element) => columns.find((each) => each.element.contains(element));

  const go = (params) => {
    history.pushState(null, "", params.size ? `?${params}` : location.pathname);
    mark();
    look(false);
  };
  const change = (fields) => {
    const params = query();
    for (const [name, value] of Object.entries(fields)) value ? params.set(name, value) : params.delete(name);
    go(params);
  };
  /** The open study is named, so that the address keeps it when a newer one begins. */
  const opened = () => ({ study: columns[0].study, family: columns[0].family });
  const pick = (column, ids) => change({ ...opened(), [`${column.prefix}runs`]: ids.join(".") || "none" });

  const mark = () => {
    const params = query();
    for (const button of document.querySelectorAll("[data-change]")) {
      const { change: name, to } = button.dataset;
      const first = document.querySelector(`[data-change="${name}"]`).dataset.to;
      button.setAttribute("aria-pressed", String((params.get(name) || first) === to));
    }
    for (const { element, prefix } of columns) {
      const ids = params.get(`${prefix}runs`)?.split(".");
      const all = boxes(element);
      if (ids) all.forEach((box) => box.setAttribute("aria-checked", String(ids.includes(idOf(box)))));
      const count = element.querySelector(".count");
      if (count) count.textContent = `${all.filter(isChecked).length} of ${all.length} picked`;
      const rule = params.get("rule"), panel = params.get("panel");
      element.querySelectorAll(".overview").forEach((root) => Figures.pick(root, { rule, panel }));
    }
    for (const item of document.querySelectorAll("#list li")) {
      const [isOpen, isBeside] = columns.map(({ study, family }) => study === item.dataset.study && family === item.dataset.family);
      item.classList.toggle("here", isOpen);
      item.classList.toggle("second", isBeside);
      const link = item.querySelector("a");
      isOpen ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
      const button = item.querySelector("[data-beside]");
      button.hidden = isOpen;
      button.setAttribute("aria-pressed", String(isBeside));
    }
    if (document.activeElement !== $("text")) $("text").value = params.get("text") || "";
  };

  const get = async (path, more) => {
    const params = query();
    for (const [name, value] of Object.entries(more)) if (value) params.set(name, value);
    const response = await fetch(`${path}?${params}`, { signal: AbortSignal.timeout(patience) });
    if (response.status === 204) return null;
    if (!response.ok) throw new Error(response.statusText); // what is shown stays, and is asked for again
    return response.headers.get("Content-Type").startsWith("application/json") ? response.json() : response.text();
  };

  /** Replaces the content and keeps the place of the reader: the focus, open tables, scrolled parts and drawn figures. */
  const put = (element, html) => {
    const focused = element.contains(document.activeElement) ? document.activeElement : null;
    const address = focused && (focused.id ? `#${CSS.escape(focused.id)}` : `[aria-label="${CSS.escape(focused.ariaLabel || "")}"]`);
    const open = [...element.querySelectorAll("details[open]")].map((each) => each.id);
    const scrolled = new Map([...element.querySelectorAll(".scroll")].map((each) => [each.ariaLabel, [each.scrollLeft, each.scrollTop]]));
    const drawn = new Map([...element.querySelectorAll("[data-figure][data-theme]")].map((each) => [each.dataset.figure, each]));
    const top = window.scrollY;
    element.innerHTML = html;
    open.forEach((id) => $(id) && ($(id).open = true));
    element.querySelectorAll(".scroll").forEach((each) => each.scrollTo(...(scrolled.get(each.ariaLabel) || [0, 0])));
    for (const place of element.querySelectorAll("[data-figure]")) {
      const old = drawn.get(place.dataset.figure);
      if (!old || old.isConnected) continue;
      old.ariaLabel = place.ariaLabel;
      place.replaceWith(old);
    }
    window.scrollTo({ top, behavior: "instant" });
    if (address) element.querySelector(address)?.focus({ preventScroll: true });
  };

  const showList = async (mine, again) => {
    const html = await get("/list", { look: again ? "1" : "" });
    if (mine !== looks || html === list) return;
    list = html;
    put($("list"), html);
    mark();
  };

  const showStudy = async (mine, column) => {
    const search = location.search;
    const isWanted = !column.second || query().has("beside");
    column.element.hidden = !isWanted;
    document.body.classList.toggle("two", query().has("beside"));
    if (!isWanted) {
      Object.assign(column, { search: null, version: "", drawings: {}, study: "", family: "" });
      column.element.innerHTML = "";
      return;
    }
    const study = await get("/study", { second: column.second, seen: search === column.search ? column.version : "" });
    if (mine !== looks || study === null) return;
    Object.assign(column, { search, version: study.version, drawings: study.drawings, study: study.study, family: study.family });
    if (!column.second) document.title = study.window;
    put(column.element, study.html);
    mark();
    Figures.show(Object.assign({}, ...columns.map((each) => each.drawings)));
    if (focusHeading && !column.second) column.element.querySelector(".title")?.focus();
    focusHeading = focusHeading && Boolean(column.second);
  };

  const look = async (again) => {
    const mine = ++looks;
    clearTimeout(timer);
    const listed = showList(mine, again);
    if (list === null) await listed.catch(() => {}); // the first look: the list comes before the figures
    const results = await Promise.allSettled([listed, ...columns.map((each) => showStudy(mine, each))]);
    if (mine !== looks) return;
    const isLost = results.some((each) => each.status === "rejected");
    $("lost").hidden = !isLost || paused;
    if (paused) return;
    timer = setTimeout(look, isLost ? Math.min(every, 1000) : every, true);
  };

  const open = (item) => {
    const params = query();
    ["runs", "rule", "panel"].forEach((each) => params.delete(each));
    const { study, family } = columns[1];
    if (study === item.dataset.study && family === item.dataset.family) ["beside", "beside_family", "beside_runs"].forEach((each) => params.delete(each));
    params.set("study", item.dataset.study);
    params.set("family", item.dataset.family);
    go(params);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-change], [data-beside], [data-pick], tr[data-run], #pause");
    if (button?.id === "pause") {
      paused = !paused;
      button.setAttribute("aria-pressed", String(paused));
      paused ? clearTimeout(timer) : look(true);
    } else if (button?.dataset.change) change({ [button.dataset.change]: button.dataset.to });
    else if (button?.dataset.pick) {
      const column = columnOf(button);
      pick(column, button.dataset.pick === "all" ? boxes(column.element).map(idOf) : []);
    } else if (button?.dataset.run) {
      const column = columnOf(button);
      pick(column, boxes(column.element).filter((box) => isChecked(box) !== button.contains(box)).map(idOf));
    } else if (button) {
      const { study, family } = button.closest("li").dataset;
      const isBeside = button.getAttribute("aria-pressed") === "true";
      change({ ...opened(), beside: isBeside ? "" : study, beside_family: isBeside ? "" : family, beside_runs: "" });
    }
    const link = event.target.closest("#list a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return; // these keys open another window
    event.preventDefault();
    focusHeading = true;
    if (!isWide.matches) $("studies").open = false;
    open(link.closest("li"));
  });
  document.addEventListener("picked", ({ detail }) => {
    const params = query();
    for (const name of ["rule", "panel"]) if (detail[name]) params.set(name, detail[name]);
    history.replaceState(null, "", `?${params}`);
    columns.forEach((each) => { each.search = each.search === null ? null : location.search; });
    mark();
  });
  $("text").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ text: $("text").value.trim() }), 300);
  });
  window.addEventListener("popstate", () => {
    $("text").value = query().get("text") || "";
    mark();
    look(false);
  });
  const isWide = window.matchMedia("(min-width: 64rem)");
  const unfold = () => { $("studies").open = isWide.matches; };
  isWide.addEventListener("change", unfold);
  unfold();
  mark();
  look(true);
})();
