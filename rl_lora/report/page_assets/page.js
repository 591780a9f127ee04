
/* The tables, and the browser of samples: {rows: [names], pair: [row, row] or [], problems: [{number, seed, prompt,
   reference, samples: {row: [{texts, reward, success, ...}]}}]}; then the episodes that were sampled in training, by
   step: [{step, problems}], one row each. What a model wrote is only ever set as text. */

const PROBLEMS_A_PAGE = 20, ANSWERS_SHOWN = 8, REPLIES_SHOWN = 2, EPISODES_SHOWN = 4;

const page = JSON.parse(document.getElementById("data").textContent);
document.querySelectorAll("figure.chart").forEach((figure, i) => draw(figure, page.charts[i]));

/* ---- results: sorted by any column ---- */

document.querySelectorAll("#results thead th").forEach((heading, column) => {
  const button = el("button", { type: "button" }, heading.textContent);
  heading.replaceChildren(button);
  button.addEventListener("click", () => {
    const body = document.querySelector("#results tbody");
    const direction = heading.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction < 0 ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      if (column === 0) return direction * a.cells[0].textContent.localeCompare(b.cells[0].textContent, "en", { numeric: true });
      if (key(a) === undefined || key(b) === undefined) return (key(a) === undefined) - (key(b) === undefined); // unknown: last
      return direction * (key(a) - key(b));
    };
    body.append(...[...body.rows].sort(order));
  });
});

/* ---- pairs: one stop for the keyboard, arrows within; a press filters the samples ---- */

const pairs = document.getElementById("pairs");
if (pairs) {
  const cell = (a, b) => pairs.querySelector(`button[data-a="${a}"][data-b="${b}"]`);
  const first = pairs.querySelector("button");
  if (first) first.tabIndex = 0;
  pairs.addEventListener("focusin", ({ target }) => {
    for (const button of pairs.querySelectorAll('button[tabindex="0"]')) button.tabIndex = -1;
    target.tabIndex = 0;
  });
  pairs.addEventListener("keydown", (event) => {
    const [down, across] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
    let a = Number(event.target.dataset.a) + down, b = Number(event.target.dataset.b) + across;
    if ((!down && !across) || Number.isNaN(a)) return;
    event.preventDefault();
    if (a === b) (a += down), (b += across); // over the diagonal
    cell(a, b)?.focus();
  });
  pairs.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button || !browser) return;
    browser.filter({ a: button.dataset.a, b: button.dataset.b });
    document.getElementById("samples").scrollIntoView();
  });
}

/* ---- verdicts ---- */

const { rows, problems, pair } = page.browser;
const everything = [...problems, ...page.sampled.flatMap((step) => step.problems)];
const judged = everything.some((problem) => Object.values(problem.samples).some((list) => list.some((sample) => isNumber(sample.success) || typeof sample.success === "boolean")));

/** What a sample counts: its verdict, or its reward where the environment gives none; null where it was not scored. */
function score(sample) {
  if (sample.unscorable) return null;
  return judged ? (sample.success === undefined ? null : Number(sample.success)) : sample.reward ?? null;
}

/** Mean score of a row's samples of a problem, or null. */
function rate(problem, row) {
  const scores = (problem.samples[row] ?? []).map(score).filter((value) => value !== null);
  return scores.length ? scores.reduce((sum, value) => sum + value, 0) / scores.length : null;
}

/** Solved by a (at least once) and not by b (not always); of two rows, more often by a than by b. */
function solvedBy(problem, a, b) {
  const [of, and] = [a, b].map((row) => (row === "" ? null : rate(problem, row)));
  if (a !== "" && b !== "") return of !== null && and !== null && of > and;
  if (a !== "") return of !== null && of > 0;
  return b === "" || (and !== null && and < 1);
}

function differs(problem) {
  const rates = rows.map((_, row) => rate(problem, row)).filter((value) => value !== null);
  return rates.some((value) => value !== rates[0]);
}

/** [class, words] of a row's samples. */
function verdict(samples) {
  const scores = samples.map(score).filter((value) => value !== null);
  if (!scores.length) return ["unjudged", samples.every((sample) => sample.unscorable) ? "unscorable" : "no verdict"];
  const sum = scores.reduce((total, value) => total + value, 0);
  if (!judged) return ["unjudged", `reward ${format(sum / scores.length)}`];
  if (samples.length === 1) return sum ? ["solved", "✓ solved"] : ["wrong", "✗ wrong"];
  return [sum === scores.length ? "solved" : sum ? "mixed" : "wrong", `${sum ? "✓" : "✗"} ${sum} of ${scores.length} solved`];
}

/* ---- one problem ---- */

const counted = (n, noun) => `${n.toLocaleString("en")} ${n === 1 ? noun : `${noun}s`}`;
const others = (n) => `${n} other ${n === 1 ? "reply" : "replies"}`;

function text(className, content) {
  return content === "" ? el("p", { className: "empty" }, "empty") : el("pre", { className }, content);
}

function details(sample, verdictToo) {
  const [kind, words] = verdict([sample]);
  const parts = [
    verdictToo ? el("span", { className: `verdict ${kind}` }, words) : null,
    sample.truncated ? el("span", { className: "flag" }, "cut off") : null,
    sample.answer === undefined ? null : `answer ${sample.answer.length > 60 ? `${sample.answer.slice(0, 59)}…` : sample.answer}`,
    judged && sample.reward !== undefined ? `reward ${format(sample.reward)}` : null,
    ...(Object.keys(sample.parts ?? {}).length > 1 ? Object.entries(sample.parts) : []).map(([name, value]) => `${name} ${format(value)}`),
    sample.tokens === undefined ? null : `${sample.tokens}\u00a0tokens`,
  ].filter((part) => part !== null);
  return parts.flatMap((part, i) => (i ? [" · ", part] : [part]));
}

/** A reply, or a conversation: what the environment said in between is set off. What a long single reply shares with
    the one it is compared to steps back, up to the word where they part. */
function reply(sample, times, several, other) {
  const box = el("div", { className: "reply" });
  if (several) box.append(el("p", { className: "meta" }, times > 1 ? `${times} × ` : "", ...details(sample, true)));
  sample.texts.forEach((content, i) => box.append(text(i % 2 ? "said" : "", content)));
  const [mine, theirs] = [sample.texts[0], other?.texts[0]];
  if (sample.texts.length === 1 && theirs !== undefined && mine !== theirs) {
    let n = 0;
    while (n < mine.length && mine[n] === theirs[n]) n += 1;
    n = Math.max(mine.lastIndexOf(" ", n), mine.lastIndexOf("\n", n)) + 1;
    if (n > 24) box.lastChild.replaceChildren(el("span", { className: "shared" }, mine.slice(0, n)), mine.slice(n));
  }
  return box;
}

/** The samples of the rows that answered alike. */
function answer(names, samples, other) {
  const [kind, words] = verdict(samples);
  const distinct = new Map();
  for (const sample of samples) {
    const key = JSON.stringify([sample.texts, sample.success, sample.unscorable]);
    distinct.set(key, { sample, times: (distinct.get(key)?.times ?? 0) + 1 });
  }
  const several = samples.length > 1;
  const who = el("div", { className: "who" }, el("b", {}, ...names.flatMap((name, i) => [i ? ", " : "", el("span", {}, name)])), el("span", { className: "verdict" }, words));
  if (!several) {
    const [first, ...rest] = details(samples[0], false);
    if (first !== undefined) who.append(" · ", first, ...rest);
  }
  const replies = [...distinct.values()].sort((a, b) => b.times - a.times).map(({ sample, times }) => reply(sample, times, several, several ? undefined : other));
  const box = el("div", { className: "replies" }, ...replies.slice(0, REPLIES_SHOWN));
  if (replies.length > REPLIES_SHOWN) {
    box.append(el("details", {}, el("summary", {}, others(replies.length - REPLIES_SHOWN)), el("div", { className: "replies" }, ...replies.slice(REPLIES_SHOWN))));
  }
  return el("li", { className: kind }, who, box);
}

/** Rows that gave the same replies share an answer; those of the filter come first. */
function answers(problem, pinned) {
  const alike = new Map();
  for (const row of new Set([...pinned, ...rows.keys()])) {
    if (!problem.samples[row]) continue;
    const key = JSON.stringify(problem.samples[row].map((sample) => [sample.texts, sample.success, sample.unscorable]));
    const entry = alike.get(key) ?? { names: [], samples: problem.samples[row] };
    entry.names.push(rows[row]);
    alike.set(key, entry);
  }
  const all = [...alike.values()];
  const items = all.map(({ names, samples }, i) => answer(names, samples, i ? all[0].samples[0] : undefined));
  const list = el("ul", { className: "answers" }, ...items.slice(0, ANSWERS_SHOWN));
  const rest = items.slice(ANSWERS_SHOWN);
  return rest.length ? [list, el("details", { className: "more" }, el("summary", {}, `${rest.length} other answers`), el("ul", { className: "answers" }, ...rest))] : [list];
}

/** The episodes of one problem that were sampled in a training step, the best rewarded first. */
function group(problem) {
  const distinct = new Map();
  for (const sample of problem.samples[0]) {
    const key = JSON.stringify([sample.texts, sample.reward]);
    distinct.set(key, { sample, times: (distinct.get(key)?.times ?? 0) + 1 });
  }
  const reward = ({ sample }) => sample.reward ?? -Infinity;
  const replies = [...distinct.values()].sort((a, b) => reward(b) - reward(a)).map(({ sample, times }) => reply(sample, times, true));
  const shown = replies.length > EPISODES_SHOWN ? [...replies.slice(0, EPISODES_SHOWN - 1), replies.at(-1)] : replies;
  const [kind, words] = verdict(problem.samples[0]);
  const rewards = problem.samples[0].map((sample) => sample.reward).filter(isNumber);
  const equal = new Set(rewards).size < 2 ? ["all rewards equal: nothing to learn"] : [];
  const who = el("div", { className: "who" }, el("b", {}, counted(problem.samples[0].length, "episode")), el("span", { className: "verdict" }, [words, ...equal].join(" · ")));
  const box = el("div", { className: "replies" }, ...shown);
  if (shown.length < replies.length) {
    box.append(el("details", {}, el("summary", {}, others(replies.length - shown.length)), el("div", { className: "replies" }, ...replies.slice(EPISODES_SHOWN - 1, -1))));
  }
  const header = el("header", {}, el("h3", {}, `Problem ${problem.number}`), el("span", {}, `seed ${problem.seed}`));
  return el("article", { className: "problem" }, header, text("said", problem.prompt), el("ul", { className: "answers" }, el("li", { className: kind }, who, box)));
}

function article(problem, pinned) {
  const header = el("header", {}, el("h3", {}, `Problem ${problem.number}`));
  if (problem.seed !== null) header.append(el("span", {}, `seed ${problem.seed}`));
  if (rows.length > 1 && differs(problem)) header.append(el("span", { className: "differ" }, judged ? "verdicts differ" : "rewards differ"));
  if (rows.length > 2 && judged) {
    const kinds = rows.map((name, row) => [name, ...verdict(problem.samples[row] ?? [])]);
    const strip = el("span", { className: "strip" }, ...kinds.map(([name, kind, words]) => el("i", { className: kind, title: `${name}: ${words}` })));
    strip.setAttribute("role", "img");
    strip.setAttribute("aria-label", `solved by ${kinds.filter(([, kind]) => kind === "solved").length} of ${rows.length} rows`);
    header.append(strip);
  }
  const box = el("article", { className: "problem" }, header, text("said", problem.prompt));
  if (problem.reference !== null) box.append(el("p", { className: "reference-answer" }, "reference ", el("code", {}, typeof problem.reference === "string" ? problem.reference : JSON.stringify(problem.reference))));
  box.append(...answers(problem, pinned));
  return box;
}

/* ---- filter, search, pages ---- */

class Browser {
  constructor(form) {
    this.form = form.elements;
    this.count = document.querySelector(".count");
    this.pager = document.querySelector(".pager");
    [this.previous, this.next, this.number] = ["previous", "next", "page"].map((name) => this.pager.querySelector(`[name="${name}"]`));
    const options = (any) => [el("option", { value: "" }, any), ...rows.map((name, row) => el("option", { value: row }, name))];
    this.form.a.append(...options("any row"));
    this.form.b.append(...options("any row"));
    if (!judged) form.querySelectorAll("label").forEach((label, i) => (label.firstChild.textContent = ["Better with ", "than with "][i] ?? label.firstChild.textContent));
    this.searched = new Map();
    this.shortcuts = pair.length ? [[pair[0], pair[1]], [pair[1], pair[0]]].map(([a, b]) => this.shortcut(a, b)) : [];
    document.querySelector(".shortcuts").append(...this.shortcuts);

    let waiting;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", ({ target }) => {
      clearTimeout(waiting);
      if (target.name === "text") waiting = setTimeout(() => this.apply(), 150);
      else this.apply();
    });
    form.addEventListener("reset", () => setTimeout(() => this.apply()));
    this.form.swap.addEventListener("click", () => this.filter({ a: this.form.b.value, b: this.form.a.value }));
    this.previous.addEventListener("click", () => this.turn(this.at - 1));
    this.next.addEventListener("click", () => this.turn(this.at + 1));
    this.number.addEventListener("change", () => this.turn(this.number.value - 1));
    this.apply();
  }

  /** A button for what one row solves and another does not, with their number. */
  shortcut(a, b) {
    const n = problems.filter((problem) => solvedBy(problem, String(a), String(b))).length;
    const button = el("button", { type: "button" }, `${judged ? "solved by" : "better with"} ${rows[a]}, ${judged ? "not by" : "than with"} ${rows[b]}: ${n}`);
    Object.assign(button.dataset, { a, b });
    button.addEventListener("click", () => this.filter(button.ariaPressed === "true" ? { a: "", b: "" } : { a, b }));
    return button;
  }

  filter({ a, b }) {
    [this.form.a.value, this.form.b.value] = [String(a), String(b)];
    this.apply();
  }

  /** Everything that is written in a problem, in lower case. */
  written(problem) {
    if (!this.searched.has(problem)) {
      const replies = Object.values(problem.samples).flat().flatMap((sample) => sample.texts);
      this.searched.set(problem, [problem.prompt, String(problem.reference ?? ""), ...replies].join("\n").toLowerCase());
    }
    return this.searched.get(problem);
  }

  apply() {
    const [a, b, wanted] = [this.form.a.value, this.form.b.value, this.form.text.value.trim().toLowerCase()];
    this.pinned = [a, b].filter((row) => row !== "").map(Number);
    this.found = problems.filter((problem) => solvedBy(problem, a, b) && (!this.form.differ.checked || differs(problem)) && (!wanted || this.written(problem).includes(wanted)));
    for (const button of this.shortcuts) button.ariaPressed = String(button.dataset.a === a && button.dataset.b === b);
    this.turn(0, false);
  }

  turn(to, scroll = true) {
    const last = Math.max(0, Math.ceil(this.found.length / PROBLEMS_A_PAGE) - 1);
    this.at = clamp(Math.floor(to) || 0, 0, last);
    const start = this.at * PROBLEMS_A_PAGE, shown = this.found.slice(start, start + PROBLEMS_A_PAGE);
    document.getElementById("problems").replaceChildren(...shown.map((problem) => article(problem, this.pinned)));
    const all = counted(problems.length, "problem"), n = this.found.length.toLocaleString("en");
    this.count.textContent = shown.length ? `${n} of ${all}; ${start + 1} to ${start + shown.length} are shown` : `0 of ${all}`;
    this.pager.hidden = last === 0;
    this.pager.querySelector(".of").textContent = `of ${last + 1}`;
    Object.assign(this.number, { value: this.at + 1, max: last + 1 });
    [this.previous.disabled, this.next.disabled] = [this.at === 0, this.at === last];
    if (scroll) this.count.scrollIntoView();
  }
}

const filters = document.querySelector("form.filters");
const browser = filters ? new Browser(filters) : null;

/* ---- episodes of training, step by step ---- */

const training = document.querySelector("#sampled form");
if (training) {
  const { step, previous, next } = training.elements;
  step.append(...page.sampled.map((entry, i) => el("option", { value: i }, String(entry.step))));
  const show = (i) => {
    const { problems } = page.sampled[(step.value = clamp(i, 0, page.sampled.length - 1))];
    const n = problems.reduce((sum, problem) => sum + problem.samples[0].length, 0);
    document.querySelector("#sampled .count").textContent = `${counted(n, "episode")} of ${counted(problems.length, "problem")}, as they were sampled`;
    document.querySelector("#sampled .groups").replaceChildren(...problems.map(group));
    [previous.disabled, next.disabled] = [step.selectedIndex === 0, step.selectedIndex === page.sampled.length - 1];
  };
  training.addEventListener("submit", (event) => event.preventDefault());
  step.addEventListener("change", () => show(Number(step.value)));
  previous.addEventListener("click", () => show(step.selectedIndex - 1));
  next.addEventListener("click", () => show(step.selectedIndex + 1));
  show(page.sampled.length - 1);
}
