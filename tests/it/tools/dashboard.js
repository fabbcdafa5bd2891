// The dashboard's panels, each drawn of what Prometheus answers to the panel's own expressions: `node dashboard.js TOOLS CHROMIUM`
// with what is to be done as JSON on stdin. What is wrong is an error, and the exit code.
"use strict";
const fs = require("fs");
const path = require("path");
const [tools, executablePath] = process.argv.slice(2);
const wish = JSON.parse(fs.readFileSync(0, "utf8"));
const dashboard = JSON.parse(fs.readFileSync(path.join(__dirname, "../../../config/grafana/settled.json"), "utf8"));
const WAIT = 60000;

const escaped = (text) => String(text).replace(/[&<>"]/g, (one) => `&#${one.charCodeAt(0)};`);
const pause = (time) => new Promise((done) => setTimeout(done, time));
const panels = dashboard.panels.filter((panel) => panel.type !== "row");

// What Grafana puts in the place of its variables.
const filled = (expr) => expr
  .replaceAll("$instance", ".*")
  .replaceAll("$__rate_interval", `${4 * wish.scrape}s`)
  .replaceAll("$__range", `${wish.seconds}s`);

async function ask(expr, end) {
  const query = new URLSearchParams({ query: filled(expr), start: end - wish.seconds, end, step: wish.scrape });
  const answer = await (await fetch(`${wish.prometheus}/api/v1/query_range?${query}`)).json();
  if (answer.status !== "success") throw new Error(`${expr}: ${answer.error}`);
  return answer.data.result;
}

// Each panel with its lines: a name, and a number for each moment.
async function look(end) {
  return Promise.all(panels.map(async (panel) => {
    const lines = await Promise.all(panel.targets.map(async ({ expr, legendFormat }) => {
      const found = await ask(expr, end);
      return found.map(({ metric, values }) => ({
        name: legendFormat.replace(/\{\{(\w+)\}\}/g, (_, label) => metric[label] || "-"),
        points: values.map(([time, value]) => [time, Number(value)]).filter(([, value]) => Number.isFinite(value)),
      }));
    }));
    // A target that answers nothing would be an empty panel, or half of one.
    return { panel, missing: panel.targets.filter((_, place) => lines[place].length === 0), lines: lines.flat() };
  }));
}

const highest = (lines) => Math.max(0, ...lines.flatMap(({ points }) => points.map(([, value]) => value)));

function said(value, unit) {
  const short = (number) => (number >= 1e6 ? `${(number / 1e6).toFixed(1)}M` : number >= 1e4 ? `${(number / 1e3).toFixed(0)}k` : `${Number(number.toPrecision(3))}`);
  if (unit === "s") return value === 0 || value >= 1 ? `${short(value)} s` : `${short(value * 1000)} ms`;
  if (unit === "percentunit") return `${short(value * 100)} %`;
  if (unit === "bytes") return value >= 1024 ? `${short(value / 1024)} KiB` : `${short(value)} B`;
  return unit === "ops" ? `${short(value)}/s` : short(value);
}

const COLOURS = ["#2f6f4f", "#b3541e", "#3b5b92", "#8a3b6b", "#7a6a00", "#00708a", "#a33", "#555", "#5a8a00", "#6b4fb3"];

function drawn({ panel, lines }, end) {
  const unit = panel.fieldConfig?.defaults?.unit;
  const last = ({ points }) => (points.length ? points[points.length - 1][1] : 0);
  const legend = [...lines].sort((left, right) => last(right) - last(left)).slice(0, 5);
  const rest = lines.length - legend.length;
  const colour = (line) => COLOURS[lines.indexOf(line) % COLOURS.length];
  const names = legend.map((line) => `<span><b style="background:${colour(line)}"></b>${escaped(line.name)} ${said(last(line), unit)}</span>`).join("")
    + (rest > 0 ? `<span>and ${rest} more</span>` : "") + (panel.type === "stat" ? "" : `<span class="most">top ${said(highest(lines), unit)}</span>`);
  let body = "";
  if (panel.type === "stat") {
    body = `<p class="stat">${legend.map((line) => `${panel.title === "Versions" ? escaped(line.name) : said(last(line), unit)}`).join(" · ")}</p>`;
  } else {
    const most = highest(lines) || 1;
    const [width, height] = [panel.gridPos.w * 50, 120];
    const x = (time) => (width * (time - end + wish.seconds)) / wish.seconds;
    const y = (value) => height - (value / most) * (height - 6);
    const courses = lines.map((line) => `<polyline stroke="${colour(line)}" points="${line.points.map(([time, value]) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`).join(" ")}"/>`).join("");
    body = `<svg viewBox="0 0 ${width} ${height + 1}" preserveAspectRatio="none"><path d="M0 ${height}H${width}"/>${courses}</svg>`;
  }
  const { x: column, y: row, w, h } = panel.gridPos;
  return `<section style="grid-column:${column + 1}/span ${w};grid-row:${row + 1}/span ${h}"><h2>${escaped(panel.title)}</h2>${body}<p class="names">${names}</p></section>`;
}

function page(seen, end) {
  const rows = dashboard.panels.filter((panel) => panel.type === "row").map(({ title, gridPos }) =>
    `<h1 style="grid-column:1/-1;grid-row:${gridPos.y + 1}">${escaped(title)}</h1>`);
  return `<!doctype html><meta charset="utf-8"><style>
    body { font: 12px "DejaVu Sans", sans-serif; margin: 12px; background: #f4f4f2; color: #222 }
    main { display: grid; grid-template-columns: repeat(24, 1fr); grid-auto-rows: 22px; gap: 4px 8px }
    h1 { font-size: 14px; margin: 6px 0 0 } h2 { font-size: 12px; margin: 0 } p { margin: 0 }
    section { background: #fff; border: 1px solid #ddd; padding: 6px 8px; overflow: hidden }
    svg { width: 100%; height: 96px; display: block } path { stroke: #ccc } polyline { fill: none; stroke-width: 1.6; vector-effect: non-scaling-stroke }
    .stat { font-size: 26px; padding: 24px 0 18px; text-align: center } .most { color: #777 }
    .names span { margin-right: 10px; white-space: nowrap; font-size: 11px } b { display: inline-block; width: 9px; height: 9px; margin-right: 4px }
    </style><title>${escaped(dashboard.title)}</title><main>${rows.join("")}${seen.map((one) => drawn(one, end)).join("")}</main>`;
}

(async () => {
  // What is to be sent is reserved first, which takes its time.
  const deadline = Date.now() + 3 * WAIT + wish.seconds * 1000;
  let [seen, end, why, busySince] = [[], 0, [], 0];
  for (;;) {
    end = Math.floor(Date.now() / 1000);
    seen = await look(end);
    why = seen.flatMap(({ panel, missing }) => missing
      .filter(({ expr }) => !wish.empty.some((metric) => expr.includes(metric)))
      .map(({ expr }) => `${panel.title}: nothing for ${expr}`));
    for (const title of wish.busy) {
      const one = seen.find(({ panel }) => panel.title === title);
      if (!one) why.push(`there is no panel ${title}`);
      else if (highest(one.lines) === 0) why.push(`${title}: nothing but zero`);
    }
    if (why.length === 0) busySince ||= Date.now();
    if (busySince && (!wish.picture || Date.now() - busySince >= wish.seconds * 1000)) break;
    if (Date.now() > deadline) throw new Error(`in vain:\n${why.join("\n")}`);
    await pause(500);
  }
  if (!wish.picture) return;
  const { chromium } = require(path.join(tools, "node_modules/playwright-core"));
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const shown = await browser.newPage({ viewport: { width: 1280, height: 900 } });
  await shown.setContent(page(seen, end));
  await shown.screenshot({ path: wish.picture, fullPage: true });
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
