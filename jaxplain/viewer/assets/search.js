"use strict";

// Searches what neurons.js holds, as the server does where there is one.
(() => {
  const { columns, labels, rows } = window.jaxplainNeurons;
  const PAGE = 50;
  const asked = new URL(location.href).searchParams;
  const form = document.getElementById("search");
  const results = document.getElementById("results");
  const split = asked.get("split") || form.elements.split.value;
  const text = (name) => (asked.get(name) || "").trim();

  form.elements.split.value = split;
  for (const name of ["words", "token", "layer", "expert", "index", "kind", "sort", "order"]) {
    if (form.elements[name] && asked.has(name)) form.elements[name].value = asked.get(name);
  }
  const ranges = asked.getAll("by").map((by, i) => [by, asked.getAll("from")[i] || "", asked.getAll("to")[i] || ""]);
  [...document.querySelectorAll(".range")].forEach((row, i) => {
    if (!ranges[i]) return;
    ["by", "from", "to"].forEach((name, part) => { row.querySelector(`[name=${name}]`).value = ranges[i][part]; });
  });

  const plain = (s) => s.toLowerCase().normalize("NFD").replace(/\p{M}/gu, "");
  const wordsOf = (s) => plain(s).match(/[\p{L}\p{N}]+/gu) || [];
  // Each is a run of words, and whether the last of them may go on.
  const phrases = [...text("words").matchAll(/"([^"]*)"|([^\s"]+)/g)]
    .map(([, phrase, word]) => [wordsOf(phrase ?? word), (word || "").endsWith("*")])
    .filter(([parts]) => parts.length);
  const has = (words, [parts, open]) =>
    words.some((_, at) => parts.every((part, i) =>
      open && i === parts.length - 1 ? (words[at + i] || "").startsWith(part) : words[at + i] === part));

  const token = text("token").toLowerCase();
  const core = token.replace(/^\*+|\*+$/g, "");
  const like = (t) => {
    if (!core) return false;
    if (token.startsWith("*") && token.endsWith("*")) return t.includes(core);
    if (token.endsWith("*")) return t.startsWith(core);
    return token.startsWith("*") ? t.endsWith(core) : t === core;
  };

  const value = (row, name) => row.values[columns.indexOf(name)];
  const limits = ranges.filter(([by, low, high]) => by && (low || high));
  const kind = text("kind") || "max";
  const found = rows.filter((row) =>
    row.split === split &&
    (text("layer") === "" || row.name[0] === Number(text("layer"))) &&
    (text("index") === "" || row.name[row.name.length - 1] === Number(text("index"))) &&
    (text("expert") === "" || (row.name.length === 3 && row.name[1] === Number(text("expert")))) &&
    limits.every(([by, low, high]) => {
      const x = value(row, by);
      return x !== null && x !== undefined && (low === "" || x >= Number(low)) && (high === "" || x < Number(high));
    }) &&
    (!token || (row.tokens[kind] || []).some(like)) &&
    (!text("words") || row.explanations.some(([, said]) => phrases.length && phrases.every((p) => has(wordsOf(said), p)))));

  const sort = text("sort");
  const up = text("order") === "up" ? 1 : -1;
  if (columns.includes(sort)) {
    found.sort((a, b) => {
      const [x, y] = [value(a, sort), value(b, sort)];
      if (x === null || y === null) return (x === null) - (y === null);
      return up * (x - y);
    });
  }

  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const page = Math.min(pages, Math.max(1, Number(asked.get("page")) || 1));
  const make = (parent, tag, content, attributes = {}) => {
    const element = parent.appendChild(document.createElement(tag));
    if (content !== undefined) element.textContent = content;
    for (const [name, x] of Object.entries(attributes)) element.setAttribute(name, x);
    return element;
  };
  const at = (changes) => {
    const url = new URL(location.href);
    url.hash = "";
    for (const [name, x] of Object.entries(changes)) url.searchParams.set(name, x);
    return url.href;
  };

  make(results, "p", `${found.length.toLocaleString("en")} neurons${pages > 1 ? `, page ${page} of ${pages}` : ""}`, { class: "found" });
  if (!found.length) return;
  const scores = columns.filter((name) => name.startsWith("score|")).slice(0, 1);
  const shown = [...new Set([...scores, ...(columns.includes(sort) ? [sort] : []), ...limits.map(([by]) => by), "mean", "fraction_active", "kurtosis"])]
    .filter((name) => columns.includes(name));
  const table = make(results, "table", undefined, { class: "results" });
  const head = make(make(table, "thead"), "tr");
  make(make(head, "th"), "a", "neuron", { href: at({ sort: "neuron", page: 1 }) });
  for (const name of shown) {
    const order = sort === name && up < 0 ? "up" : "down";
    const arrow = sort === name ? (up < 0 ? " ↓" : " ↑") : "";
    make(make(head, "th", undefined, { class: "value" }), "a", labels[name] + arrow, { href: at({ sort: name, order, page: 1 }) });
  }
  make(head, "th", "explanations");
  const body = make(table, "tbody");
  for (const row of found.slice((page - 1) * PAGE, page * PAGE)) {
    const line = make(body, "tr");
    make(make(line, "td"), "a", row.title, { href: `neuron/${row.split}/${row.name.join(".")}.html` });
    for (const name of shown) {
      const x = value(row, name);
      make(line, "td", x === null || x === undefined ? "–" : String(Number(x.toPrecision(4))), { class: "value" });
    }
    const cell = make(line, "td");
    for (const [sign, said] of row.explanations.slice(0, 4)) {
      make(cell, "p", `${sign === "max" ? "+" : "−"} ${said.length > 300 ? `${said.slice(0, 300)}…` : said}`, { dir: "auto" });
    }
  }
  const turn = make(results, "p", undefined, { class: "pages" });
  if (page > 1) make(turn, "a", "← previous page ", { rel: "prev", href: at({ page: page - 1 }) });
  if (page < pages) make(turn, "a", "next page →", { rel: "next", href: at({ page: page + 1 }) });
})();
