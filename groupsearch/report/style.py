"""The page's style sheet and the script that hands figures to plotly: text only, nothing is filled in."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --ink: #1b2026; --soft: #59636e; --page: #ffffff; --panel: #f5f7f9; --line: #dfe4e9;
  --accent: #00795a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #a0aab4; --page: #121518; --panel: #1b1f24;
  --line: #30363d; --accent: #3fcf9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55; font-size: 1rem;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
.eyebrow { margin: 0 0 .5rem; color: var(--accent); font-weight: 600; font-size: .875rem; letter-spacing: .02em;
  overflow-wrap: anywhere; }
h1 { margin: 0 0 1.5rem; font-size: clamp(1.35rem, 1rem + 1.9vw, 2.1rem); line-height: 1.25; font-weight: 650;
  letter-spacing: -.015em; text-wrap: balance; overflow-wrap: anywhere; }
h2 { margin: 3.5rem 0 .35rem; font-size: 1.3rem; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; }
p { margin: 0 0 1rem; max-width: 44rem; }
.lede { color: var(--soft); }
.keys { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1px; margin: 0 0 1.75rem;
  background: var(--line); border: 1px solid var(--line); border-radius: .75rem; overflow: hidden; }
.keys div { background: var(--panel); padding: 1rem 1.15rem; display: flex; flex-direction: column; }
.keys dt { color: var(--soft); font-size: .875rem; }
.keys dd { margin: 0; }
.keys .value { font-size: 1.6rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.keys .note { color: var(--soft); font-size: .8125rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0 0; }
figcaption { color: var(--soft); font-size: .875rem; max-width: 44rem; margin-top: .5rem; }
.plot { width: 100%; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; }
th, td { text-align: left; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 22rem; overflow-wrap: anywhere; min-width: 4.5rem; }
td.number { white-space: nowrap; }
.facts, .side { display: grid; gap: 1rem 1.5rem; margin: 1rem 0; }
.facts { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.side { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 2.5rem; }
.facts dt { color: var(--soft); font-size: .875rem; }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .8rem 0; font-weight: 600; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
footer { margin-top: 3rem; color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
@media (max-width: 36rem) { main { padding: 2rem 1rem 3rem; } .keys { grid-template-columns: 1fr 1fr; }
  .keys div { padding: .8rem .9rem; } .keys .value { font-size: 1.3rem; } h2 { margin-top: 2.75rem; } }
@media print { .plot { break-inside: avoid; } }
"""

SCRIPT = """
(function () {
  const plots = Array.from(document.querySelectorAll(".plot"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
  function themed(layout) {
    const look = JSON.parse(JSON.stringify(layout));
    const family = getComputedStyle(document.body).fontFamily;
    look.font = { color: colour("--ink"), family: family, size: 13 };
    look.hoverlabel = { bgcolor: colour("--panel"), bordercolor: colour("--line"),
      font: { color: colour("--ink"), family: family, size: 13 }, align: "left" };
    for (const axis of ["xaxis", "yaxis"]) {
      look[axis].gridcolor = colour("--line");
      look[axis].tickfont = { color: colour("--soft"), size: 12 };
      look[axis].title.font = { color: colour("--soft"), size: 13 };
    }
    return look;
  }
  function draw() {
    for (const plot of plots) {
      const figure = JSON.parse(document.getElementById(plot.id + "-data").textContent);
      Plotly.react(plot, figure.data, themed(figure.layout), { displayModeBar: false, responsive: true });
    }
  }
  dark.addEventListener("change", draw);
  draw();
})();
"""
