// The console in a real browser: `node console.js TOOLS CHROMIUM` with what is to be done as JSON on stdin. What is wrong is an
// error, and the exit code.
"use strict";
const fs = require("fs");
const path = require("path");
const [tools, executablePath] = process.argv.slice(2);
const { chromium } = require(path.join(tools, "node_modules/playwright-core"));
const axe = fs.readFileSync(path.join(tools, "node_modules/axe-core/axe.min.js"), "utf8");
const wish = JSON.parse(fs.readFileSync(0, "utf8"));
const WAIT = 30000;

const must = (truth, why) => { if (!truth) throw new Error(why); };

// Somebody who comes through the proxy.
async function visitor(browser, name, options = {}) {
  const context = await browser.newContext({
    extraHTTPHeaders: { "x-settled-proxy-secret": wish.secret, "x-forwarded-user": name },
    javaScriptEnabled: wish.scripts,
    viewport: { width: 1280, height: 860 },
    ...options,
  });
  const page = await context.newPage();
  page.setDefaultTimeout(WAIT);
  page.problems = [];
  page.on("dialog", (dialog) => { page.problems.push(`a dialog: ${dialog.message()}`); dialog.dismiss(); });
  page.on("pageerror", (error) => page.problems.push(`a script failed: ${error.message}`));
  page.on("console", (message) => {
    // What is refused on purpose is an answer, not a problem.
    if (message.type() === "error" && !/status of (400|401|404|409)/.test(message.text())) page.problems.push(message.text());
  });
  page.on("request", (request) => {
    if (!request.url().startsWith(wish.url)) page.problems.push(`a request went to ${request.url()}`);
  });
  return page;
}

// No violation of axe's rules, which need scripts to run.
async function accessible(page, where) {
  if (!wish.scripts) return;
  const { violations } = await page.evaluate(`${axe}; axe.run()`);
  const said = violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.target.join(" ")).join(", ")}`);
  must(said.length === 0, `${where}: ${said.join("\n")}`);
  const wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth");
  must(wide <= 0, `${where} is ${wide} pixels wider than its window`);
}

async function shot(page, name) {
  if (wish.pictures && wish.scripts) await page.screenshot({ path: path.join(wish.pictures, `console-${name}.png`) });
}

// Until something is on the page, which is loaded again where no script does.
async function until(page, text, longer = 0) {
  const deadline = Date.now() + WAIT + longer;
  while (Date.now() < deadline) {
    if ((await page.textContent("main")).includes(text)) return;
    if (!wish.scripts) await page.reload();
    else await page.waitForTimeout(100);
  }
  throw new Error(`waited in vain for ${text}: ${await page.textContent("main")}`);
}

const form = (page, action) => page.locator(`form[action="${action}"]`).first();

async function send(page, action, fields) {
  const one = form(page, action);
  for (const [name, value] of Object.entries(fields)) await one.locator(`[name=${name}]`).fill(value);
  await one.locator("button").first().click();
}

async function incident(browser) {
  const ann = await visitor(browser, "ann");
  await ann.goto(wish.url);
  await until(ann, "open letters");
  await accessible(ann, "overview");
  await shot(ann, "overview");
  await ann.click("nav.places >> text=Groups");
  await ann.waitForURL("**/groups");
  await accessible(ann, "groups");
  await ann.click("tbody th a");
  await ann.waitForURL("**/letters?**");
  await accessible(ann, "letters");
  await ann.click("tbody th a");
  await ann.waitForURL("**/letters/*");
  await ann.click("text=Show the message");
  await until(ann, "Body and signed payload say the same");
  await accessible(ann, "letter");
  await shot(ann, "letter");
  await ann.goto(`${wish.url}/letters?partner=acme`);
  await ann.click(`text=Plan ${wish.messages} messages`);
  await ann.waitForURL("**/plans/*");
  const plan = new URL(ann.url()).pathname;
  await accessible(ann, "plan");
  await send(ann, `${plan}/replay`, { canary: "2", rate: "0.01", why: "the key is there" });
  await until(ann, "nobody else has approved");

  const bob = await visitor(browser, "bob");
  await bob.goto(wish.url + plan);
  await send(bob, `${plan}/approve`, { why: "I looked at it" });
  await until(bob, "you approved the replay");
  await accessible(bob, "approved");
  await shot(bob, "plan");

  await ann.goto(wish.url + plan);
  await send(ann, `${plan}/replay`, { canary: "2", rate: "0.01", why: "the key is there" });
  await ann.waitForURL("**/runs/*");
  const run = new URL(ann.url()).pathname;
  await until(ann, "2: judged as planned");
  if (wish.scripts) {
    // It is looked at anew every second, and what has the focus keeps it.
    await form(ann, `${run}/cancel`).locator("[name=why]").fill("too slow");
    await form(ann, `${run}/cancel`).locator("button.danger").focus();
    for (let looks = 0; looks < 3; looks += 1) await ann.waitForResponse(/again=1/);
    await ann.waitForFunction(() => document.querySelector("#run.htmx-request") === null);
    must(await ann.evaluate("document.activeElement.textContent") === "Stop this run", "the button has the focus still");
    must(await form(ann, `${run}/cancel`).locator("[name=why]").inputValue() === "too slow", "what was typed is there still");
    must(await ann.locator("#run button.copy").first().isVisible(), "a command can be copied still");
  }
  await accessible(ann, "run");
  await shot(ann, "run");
  await send(ann, `${run}/cancel`, { why: "too slow" });
  await until(ann, "cancelled");
  await send(ann, `${run}/resume`, { rate: "1000", why: "faster" });
  await until(ann, "Every message of it is judged or skipped");
  await accessible(ann, "done");
  await ann.goto(`${wish.url}/timeline?of=${wish.allocation}`);
  await until(ann, "replayed");
  await accessible(ann, "timeline");
  await shot(ann, "timeline");
  for (const place of ["/partners", "/partners/acme", "/ledger", "/ledger/check", "/outbox", "/audit", "/runs", "/plans", "/sessions", "/purge", "/discard", "/doctor"]) {
    await ann.goto(wish.url + place);
    await accessible(ann, place);
  }
  // A reader sees the same, and why not.
  const rita = await visitor(browser, "rita");
  await rita.goto(wish.url + plan);
  await accessible(rita, "plan of a reader");
  must(await form(rita, `${plan}/replay`).locator("button").isDisabled(), "a reader may not replay");
  await until(rita, "this needs the role operator; yours is reader");
  // In the dark, and on a phone.
  const phone = await visitor(browser, "ann", { colorScheme: "dark", viewport: { width: 390, height: 800 } });
  for (const place of ["/", "/groups", "/letters", plan, run, `/timeline?of=${wish.allocation}`]) {
    await phone.goto(wish.url + place);
    await accessible(phone, `${place} on a phone in the dark`);
  }
  await phone.goto(wish.url);
  await until(phone, "open letters");
  await shot(phone, "phone");
  for (const page of [ann, bob, rita, phone]) must(page.problems.length === 0, page.problems.join("\n"));
}

// Nothing but the keyboard.
async function keyboard(browser) {
  const ann = await visitor(browser, "ann");
  const focused = () => ann.evaluate(() => {
    const one = document.activeElement;
    return `${one.tagName} ${one.name || ""} ${one.textContent.trim()}`;
  });
  const tabTo = async (what) => {
    for (let tabs = 0; tabs < 200; tabs += 1) {
      await ann.keyboard.press("Tab");
      const there = await focused();
      if (what.test(there)) return;
    }
    throw new Error(`the tabulator never comes to ${what}`);
  };
  await ann.goto(wish.url);
  await ann.keyboard.press("Tab");
  must(/To the content/.test(await focused()), "first there is a way past what stands on every page");
  await tabTo(/^A +Letters$/);
  await ann.keyboard.press("Enter");
  await ann.waitForURL("**/letters");
  await until(ann, "Plan ");
  await tabTo(/^BUTTON +Plan \d+ messages$/);
  const outline = await ann.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  must(outline !== "none", "what has the focus can be seen");
  await ann.keyboard.press("Enter");
  await ann.waitForURL("**/plans/*");
  await until(ann, "Discard");
  await tabTo(/^INPUT rate/);
  await tabTo(/^INPUT why/);
  await ann.keyboard.type("by keyboard alone");
  await ann.keyboard.press("Enter");
  // They were replayed as often as they may be: that it is meant wants a box to be ticked.
  await until(ann, "they may go in circles, and nothing was done");
  await tabTo(/^INPUT yes_again/);
  await ann.keyboard.press("Space");
  await tabTo(/^INPUT why/);
  await ann.keyboard.type("by keyboard alone");
  await ann.keyboard.press("Enter");
  await ann.waitForURL("**/runs/*");
  await until(ann, "Every message of it is judged or skipped");
  must(ann.problems.length === 0, ann.problems.join("\n"));
}

// A worker at work, as somebody sees it who has the overview open and touches nothing.
async function load(browser) {
  const ann = await visitor(browser, "ann");
  await ann.goto(wish.url);
  await until(ann, "✓ready", wish.minutes * 60000);
  const numbers = async () => ann.evaluate(() => {
    const text = (from, what) => from?.querySelector(what)?.textContent ?? "";
    const workers = document.querySelector("[aria-labelledby=h-workers] tbody tr");
    const tiles = [...document.querySelectorAll(".tile")].map((tile) => text(tile, ".value"));
    return {
      p50: text(workers, "td:nth-of-type(2)"),
      p99: text(workers, "td:nth-of-type(3)"),
      judged: [...document.querySelectorAll("[aria-labelledby=h-partners] tbody tr td:nth-of-type(2)")].map((one) => one.textContent),
      minutes: document.querySelectorAll("svg.bars g").length,
      tiles,
    };
  });
  // Whatever changes, a partner's link keeps the focus.
  const link = ann.locator("[aria-labelledby=h-partners] tbody a").first();
  await link.waitFor({ timeout: WAIT + wish.minutes * 60000 });
  await link.focus();
  const place = await ann.evaluate("document.activeElement.href");
  // What is to be sent is reserved first, which takes its time.
  const deadline = Date.now() + WAIT + (wish.minutes && wish.minutes + 3) * 60000;
  let [seen, changes, before] = [null, 0, ""];
  while (Date.now() < deadline) {
    seen = await numbers();
    const now = JSON.stringify(seen);
    if (before && now !== before) changes += 1;
    before = now;
    const busy = [seen.p50, seen.p99].every((time) => /ms|s$/.test(time)) && seen.judged.some((one) => Number(one) > 0);
    if (busy && changes >= 3 && seen.minutes > wish.minutes) break;
    await ann.waitForTimeout(200);
  }
  const said = JSON.stringify(seen);
  must(changes >= 3, `what is seen changes by itself: ${said}`);
  must(/ms|s$/.test(seen.p50) && /ms|s$/.test(seen.p99), `how long a message takes is said: ${said}`);
  must(seen.judged.some((one) => Number(one) > 0), `what each partner sends is said: ${said}`);
  must((await ann.evaluate("document.activeElement.href")) === place, "the link has the focus still");
  await accessible(ann, "the overview under load");
  await shot(ann, "load");
  must(ann.problems.length === 0, ann.problems.join("\n"));
}

// What is looked at again and again: an alert is said once, and who is signed out is told so.
async function watched(browser) {
  const ann = await visitor(browser, "ann");
  await ann.goto(`${wish.url}/enter?link=${wish.link}`);
  await ann.click("main button");
  await until(ann, "the broker: ");
  await ann.waitForFunction(() => document.getElementById("live-state").textContent === "live");
  const said = await ann.evaluate(() => new Promise((done) => {
    let alerts = 0;
    const isIn = (node) => (node.nodeType === Node.ELEMENT_NODE ? node : node.parentElement)?.closest("[role=alert]");
    const seen = new MutationObserver((changes) => {
      for (const { target, addedNodes } of changes) if (isIn(target) || [...addedNodes].some(isIn)) alerts += 1;
    });
    seen.observe(document.getElementById("overview"), { subtree: true, childList: true, characterData: true });
    let looks = 0;
    const other = new EventSource("/live");
    other.onmessage = () => {
      looks += 1;
      if (looks < 5) return;
      other.close();
      done(alerts);
    };
  }));
  must(said === 0, `an alert was said again, ${said} times`);
  await ann.evaluate(() => {
    const body = new URLSearchParams(new FormData(document.querySelector('form[action="/sign-out"]')));
    return fetch("/sign-out", { method: "POST", body });
  });
  await ann.waitForFunction(() => document.getElementById("live-state").textContent.includes("signed out"));
  must(ann.problems.length === 0, ann.problems.join("\n"));
}

// What others wrote is shown, and does nothing.
async function hostile(browser) {
  const ann = await visitor(browser, "ann");
  for (const place of ["/", "/groups", "/letters", `/letters?nonce=${encodeURIComponent(wish.nonce)}`, `/letters?partner=${encodeURIComponent(wish.nonce)}`, "/partners", "/partners/acme", `/letters/${wish.letter}`, `/discard?nonce=${encodeURIComponent(wish.nonce)}`, "/ledger", "/outbox", "/audit", `/audit?operator=${encodeURIComponent(wish.nonce)}`, `/timeline?of=${encodeURIComponent(wish.nonce)}`]) {
    await ann.goto(wish.url + place);
    must((await ann.evaluate("window.pwned")) === undefined, `a script ran on ${place}`);
    must((await ann.locator("main img, main script, main iframe, main marquee").count()) === 0, `markup stands on ${place}`);
    const text = await ann.textContent("body");
    must(!/[\u202a-\u202e\u2066-\u2069\u200b-\u200f]/.test(text), `something hidden stands on ${place}`);
    await accessible(ann, place);
  }
  await ann.goto(`${wish.url}/letters/${wish.letter}`);
  await until(ann, "<img src=x onerror=");
  await ann.click("text=Show the message");
  await until(ann, "As it was received");
  must((await ann.evaluate("window.pwned")) === undefined, "a script ran beside the body");
  // A filter that holds what can not be seen is still that filter.
  await ann.click("text=This nonce only");
  await until(ann, "Plan 1 messages");
  await ann.click("text=Plan 1 messages");
  await ann.waitForURL("**/plans/*");
  // Nobody frames it.
  await ann.goto("about:blank");
  await ann.setContent(`<iframe src="${wish.url}/plans"></iframe>`);
  await ann.waitForTimeout(500);
  must(!(await ann.frames().at(-1).content()).includes("Plans"), "it can be framed");
}

(async () => {
  const browser = await chromium.launch({
    executablePath,
    args: ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  });
  try {
    await { incident, keyboard, hostile, load, watched }[wish.story](browser);
  } finally {
    await browser.close();
  }
})().catch((error) => {
  console.error(error.stack);
  process.exit(1);
});
