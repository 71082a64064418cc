"""What every page brings along: its style, and the few lines of script that move the instant shown."""

CSS = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1b; --quiet: #5a5a5a; --line: #cfcfcf; --field: #f3f3f1;
  --good: #176b36; --bad: #b3261e; --base: #a9a9a9; }
@media (prefers-color-scheme: dark) { :root { --page: #151617; --text: #ececec; --quiet: #a9a9a9; --line: #44474a;
  --field: #202224; --good: #6fd08c; --bad: #ff8a80; --base: #6b6b6b; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; }
.fits, .finished { color: var(--good); } .does_not_fit, .failed { color: var(--bad); }
.quiet { color: var(--quiet); font-size: .9rem; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding: .2rem 0; white-space: normal; max-width: calc(100vw - 2rem); }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } .number { text-align: right; white-space: nowrap; }
td, th { white-space: nowrap; } td:first-child, .prose td { white-space: normal; }
.prose td:first-child { overflow-wrap: anywhere; min-width: 13rem; } .prose td.number { white-space: nowrap; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem; margin: .8rem 0; }
dl > div { background: var(--field); padding: .5rem .7rem; border-radius: .3rem; }
dt { color: var(--quiet); font-size: .85rem; } dd { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
.plot { position: relative; height: 20rem; margin-left: 3.4rem; border: solid var(--line);
  border-width: 0 0 1px 1px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; touch-action: pan-y; }
.plot span { position: absolute; font-size: .8rem; line-height: 1.1; white-space: nowrap; }
.plot .y { right: calc(100% + .4rem); transform: translateY(50%); color: var(--quiet); }
.plot .limit { left: .3rem; background: var(--page); padding: 0 .2rem; opacity: .9; }
.plot .x { top: calc(100% + .3rem); transform: translateX(-50%); color: var(--quiet); }
.line { stroke: var(--text); fill: none; vector-effect: non-scaling-stroke; }
.dash { stroke-dasharray: 6 4; } .grid { stroke: var(--line); vector-effect: non-scaling-stroke; }
.base { fill: var(--base); }
.strip { position: relative; height: 2.4rem; margin-left: 3.4rem; font-size: .7rem; line-height: 1.1; }
.strip span { position: absolute; overflow: hidden; height: 100%; border-left: 1px solid var(--line); padding: .15rem; }
.strip.parts { height: 2.2rem; } .strip .is-peak { background: var(--field); font-weight: 600; }
.instant { display: flex; gap: .6rem; align-items: center; margin-left: 3.4rem; }
.instant input { flex: 1; min-width: 0; margin: 0; }
button { font: inherit; color: inherit; background: var(--field); border: 1px solid var(--line); border-radius: .3rem; }
:focus-visible { outline: 3px solid #56b4e9; outline-offset: 2px; }
.legend { list-style: none; padding: 0; margin: .6rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  font-size: .9rem; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
.swatch.base { background: var(--base); }
.below { margin-top: 1.8rem; }
.dot { position: absolute; width: 11px; height: 11px; margin: 0 0 -6px -6px; border-radius: 50%; border: 2px solid;
  background: none; padding: 0; }
.dot.over { border-style: dashed; background: none !important; } .dot.given { border-radius: 0; }
.dot:focus, .dot:hover { z-index: 1; }
.dot:focus::after, .dot:hover::after { content: attr(aria-label); position: fixed; left: 1rem; right: 1rem;
  bottom: 1rem; background: var(--text); color: var(--page); padding: .5rem .8rem; border-radius: .3rem;
  font-size: .9rem; text-align: left; }
.dot.chosen { width: 17px; height: 17px; margin: 0 0 -9px -9px; }
.curve { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.plot.low { height: 15rem; } .plot .x.last { transform: translateX(-100%); }
.lanes { margin: .8rem 0; }
.lane { display: grid; grid-template-columns: 11rem 1fr 12rem; gap: 0 .8rem; align-items: center; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
.track { position: relative; height: 1.5rem; background: var(--field); margin: .15rem 0; overflow: hidden; }
.track i { position: absolute; top: 15%; height: 70%; } .track .end { top: 0; height: 100%; }
.track svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.sample { background: var(--field); padding: .6rem .8rem; border-radius: .3rem; margin: .3rem 0 1rem;
  font: .85rem/1.4 ui-monospace, monospace; }
.bars { display: grid; grid-template-columns: 1fr 1fr; min-width: 9rem; height: 1.2em; }
.bars i { display: block; height: .8em; margin-top: .3em; }
.bars .less { background: #009e73; justify-self: end; } .bars .more { background: #d55e00; }
.bars > b { border-right: 1px solid var(--quiet); display: grid; }
nav a { display: inline-block; padding: .5rem 0; } a { color: inherit; }
form { margin: .8rem 0 2.5rem; } label { display: block; margin: .9rem 0 .2rem; font-weight: 600; }
form input, form select, form textarea { width: 100%; font: inherit; color: inherit; background: var(--field);
  border: 1px solid var(--quiet); border-radius: .3rem; padding: .5rem; }
form textarea { font: .85rem/1.4 ui-monospace, monospace; resize: vertical; }
form button { margin: 1rem .6rem 0 0; padding: .6rem 1.2rem; border-color: var(--quiet); cursor: pointer; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1rem; }
.error { border-left: 4px solid var(--bad); padding: .1rem .8rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 40rem) {
  .strip { height: 6.4rem; } .strip span { writing-mode: vertical-rl; padding: .2rem 0; white-space: nowrap; }
  .strip.parts { height: 3.6rem; } .strip.parts span { writing-mode: initial; white-space: normal;
    overflow-wrap: anywhere; }
  .prose thead { display: none; } .prose tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; align-items: center;
    border-bottom: 1px solid var(--line); padding: .3rem 0; } .prose td { border: 0; padding: 0; }
  .prose td:first-child, .prose td:last-child { flex: 1 0 100%; } .prose td:empty { display: none; }
  .prose td:last-child { color: var(--quiet); }
  .lane { grid-template-columns: 1fr auto; } .lane .track { grid-row: 2; grid-column: 1 / 3; margin-bottom: .5rem; }
  .plot { height: 16rem; } .plot .limit { font-size: .72rem; } }
@media print { :root { color-scheme: light; --page: #fff; --text: #000; --quiet: #444; --line: #bbb; --field: #f3f3f1;
  --good: #176b36; --bad: #b3261e; --base: #a9a9a9; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .instant { display: none; } section, figure, tr { break-inside: avoid; } .scroll { overflow: visible; } }
"""

# A chart's JSON: x of each instant, its words, bytes in MiB, and its largest buffers as [number, how many].
SCRIPT = """
"use strict";
for (const figure of document.querySelectorAll("figure[data-timeline]")) {
  const given = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot"), slider = figure.querySelector("input");
  const cursor = figure.querySelector(".cursor"), words = figure.querySelector(".words");
  const body = figure.querySelector("tbody");
  const mib = n => n.toLocaleString("en", {minimumFractionDigits: 1, maximumFractionDigits: 1});
  const show = i => {
    const one = given.instants[i], text = one.words + ": " + mib(one.mib) + " MiB of tensors";
    slider.value = i;
    slider.setAttribute("aria-valuetext", text);
    words.textContent = text;
    cursor.setAttribute("transform", "translate(" + one.x * 1000 + " 0)");
    body.replaceChildren(...one.rows.map(([number, count]) => {
      const [name, shape, dtype, category, each] = given.buffers[number], row = document.createElement("tr");
      [name, mib(each * count), String(count), shape, dtype, category].forEach((value, column) => {
        const cell = document.createElement("td");
        cell.textContent = value;
        if (column === 1 || column === 2) cell.className = "number";
        row.append(cell);
      });
      return row;
    }));
  };
  const at = event => {
    const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    let i = given.instants.findIndex(one => one.x > x);
    show(i < 0 ? given.instants.length - 1 : Math.max(0, i - 1));
  };
  plot.addEventListener("pointermove", at);
  plot.addEventListener("pointerdown", at);
  slider.addEventListener("input", () => show(Number(slider.value)));
  figure.querySelector("button").addEventListener("click", () => show(given.peak));
  figure.querySelector(".instant").hidden = false;
  show(given.peak);
}
const shut = [];
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach(one => {
  shut.push(one); one.open = true; }));
addEventListener("afterprint", () => { while (shut.length) shut.pop().open = false; });
"""
