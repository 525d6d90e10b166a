"use strict";
// The address is the one state of the page. What is pressed changes it, and marks, list and
// figures follow it. The server is asked again and again, each time once it has answered.
(() => {
  const every = 1000 * Number(document.body.dataset.every);
  const patience = 1000 * Number(document.body.dataset.patience); // for an answer that is lost on its way
  const $ = (id) => document.getElementById(id);
  const shown = { search: null, version: "", boxes: "", list: "" };
  let looks = 0, timer = 0, paused = false, typing = 0, focusHeading = false;

  const asked = () => new URLSearchParams(location.search);
  const boxes = () => [...document.querySelectorAll("#runs [role=checkbox]")];
  const isChecked = (box) => box.getAttribute("aria-checked") === "true";

  const go = (search, { replace = false } = {}) => {
    history[replace ? "replaceState" : "pushState"](null, "", search || location.pathname);
    mark();
    look(false);
  };
  const change = (name, value, how) => {
    const params = asked();
    value ? params.set(name, value) : params.delete(name);
    go(params.size ? `?${params}` : "", how);
  };
  const pick = (ids) => change("runs", ids.join(".") || "none");

  const mark = () => {
    const params = asked();
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
    const params = asked();
    for (const [name, value] of Object.entries(more)) if (value) params.set(name, value);
    const answer = await fetch(`${path}?${params}`, { signal: AbortSignal.timeout(patience) });
    if (answer.status === 204) return null;
    return answer.headers.get("Content-Type").startsWith("application/json") ? answer.json() : answer.text();
  };

  const put = (place, html) => {
    const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
    place.innerHTML = html;
    if (focused) $(focused)?.focus({ preventScroll: true }); // whoever uses a keyboard stays there
  };

  const showList = async (mine, again) => {
    const html = await get("/list", { look: again ? "1" : "" });
    if (mine !== looks || html === shown.list) return;
    shown.list = html;
    put($("list"), html);
  };

  const showStudy = async (mine) => {
    const search = location.search;
    const found = await get("/study", { seen: search === shown.search ? shown.version : "" });
    if (mine !== looks || found === null) return;
    shown.search = search;
    shown.version = found.version;
    $("study").textContent = found.title;
    document.title = found.window;
    $("choose").hidden = !found.boxes;
    if (found.boxes !== shown.boxes) {
      shown.boxes = found.boxes;
      put($("runs"), found.boxes);
    }
    boxes().forEach((box) => box.setAttribute("aria-checked", String(found.picked.includes(box.dataset.run))));
    count();
    $("figures").innerHTML = found.html;
    Figures($("figures"), found.drawings, "now");
    if (focusHeading) $("study").focus();
    focusHeading = false;
  };

  const look = async (again) => {
    const mine = ++looks;
    clearTimeout(timer);
    const answers = await Promise.allSettled([showList(mine, again), showStudy(mine)]);
    if (mine !== looks || paused) return;
    const isLost = answers.some((each) => each.status === "rejected");
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
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return; // which open it in another window
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
    $("text").value = asked().get("text") || "";
    mark();
    look(false);
  });
  mark();
  look(true);
})();
