"""What the page does by itself, without the server: functions of JavaScript that Dash calls when
what they listen to changes.
"""

from __future__ import annotations

SCHEME = """
function (pathname) {
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    const told = () => dark.matches ? "dark" : "light";
    if (!window.watchesScheme) {
        window.watchesScheme = true;
        document.addEventListener("focusin", (event) => { window.lastFocused = event.target.id; });
        document.addEventListener("click", (event) => {
            const button = event.target.closest("[data-png]");
            const plot = button?.closest("figure").querySelector(".js-plotly-plot");
            if (!plot) return;
            const size = {width: Math.max(720, plot.clientWidth), height: plot.clientHeight};
            window.Plotly.downloadImage(plot, {format: "png", filename: button.dataset.png, scale: 2, ...size});
        });
        document.addEventListener("click", (event) => {
            const link = event.target.closest("#list tbody a");
            if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;  // which open it in another window
            if (link.closest("tr").classList.contains("here")) document.getElementById("study").focus();
            else window.picksStudy = true;
        });
        document.addEventListener("pointerdown", () => { window.lastFocused = ""; });
        dark.addEventListener("change", () => window.dash_clientside.set_props("scheme", {data: told()}));
    }
    return told();
}
"""
PRESSED = """
function (clicks, applied, before) {
    const {triggered} = window.dash_clientside.callback_context;
    const id = each => JSON.parse(each.prop_id.slice(0, each.prop_id.lastIndexOf(".")));
    const presses = triggered.filter(each => each.value).map(each => ({...id(each), at: performance.now()}));
    if (!presses.length) return window.dash_clientside.no_update;
    return [...(before || []).filter(each => each.at > (applied || 0)), ...presses];
}
"""
"""the presses that the address does not show yet: Dash forgets a question on its way when it asks
the next. Buttons that are put on the page come along, without a value, and are none."""
COUNTED = """
function (checked) {
    return checked.length ? `Runs: ${checked.filter(each => each === "true").length} of ${checked.length} picked` : "Runs";
}
"""
NEXT = """
function (ticks, asked, answered) {
    const now = performance.now();
    return asked === answered || now - asked > PATIENCE ? now : window.dash_clientside.no_update;
}
"""
"""The next look waits for the answer to the last, by the name that this has, its time: of a
question whose answer has not come as it is asked again Dash throws the answer away, so that of a
store slower than its looks nothing would ever be shown."""
PAUSED = """
function (clicks, paused) {
    return [!paused, String(!paused)];
}
"""
"""no look while it is paused; what somebody presses is answered all the same"""
TITLED = """
function (study, search) {
    const asked = new URLSearchParams(search || "");
    const views = new Map(Object.entries(VIEWS));
    const view = views.get(asked.get("view")) || views.get("costs");
    document.title = asked.get("study") ? `${study}, ${view}, spiketrain dashboard` : "spiketrain dashboard";
    const {triggered} = window.dash_clientside.callback_context;
    if (window.picksStudy && triggered.some(each => each.prop_id === "study.children")) {
        window.picksStudy = false;
        document.getElementById("study").focus();
    }
}
"""
"""the title of the window, and once it is there the heading that whoever picked a study in the list
goes on from
"""
FOCUS = """
function (boxes) {
    const id = window.lastFocused;
    setTimeout(() => {
        if (id && document.activeElement === document.body) document.getElementById(id)?.focus({preventScroll: true});
    }, 50);
}
"""
"""the boxes are made anew when a run comes or ends: whoever presses them by keyboard stays where
they are
"""
