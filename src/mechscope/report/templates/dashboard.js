(() => {
  const { make, say, token } = reading;
  const data = JSON.parse(document.getElementById("dashboard-data").textContent);
  const { columns, tokens, examples, bars, related, chance } = data, count = columns.name.length;
  const main = document.getElementById("latent"), index = document.querySelector(".index"), more = document.querySelector(".more");
  const found = document.querySelector(".found"), controls = document.querySelector(".controls");
  const places = new Map(columns.name.map((name, at) => [name, at]));
  const AT_ONCE = 100, STEPS = 4, LOWEST = -16;
  const state = { query: "", sort: "share", kind: "", listed: [], shown: 0, at: 0 };
  const percent = (x) => `${say(100 * x)}\u202f%`;

  const starts = (counts) => { const from = new Uint32Array(counts.length + 1); counts.forEach((n, at) => { from[at + 1] = from[at] + n; }); return from; };
  // lists of tokens, and examples, are unpacked once and cut when a latent is looked at
  const listed = Object.fromEntries(["promotes", "suppresses"].map((name) => [name, { from: starts(reading.whole(data[name].counts)), tokens: reading.whole(data[name].tokens) }]));
  const packed = examples && Object.fromEntries(["decile", "position", "peak", "lengths", "text", "tokens", "levels"].map((name) => [name, reading.whole(examples[name])]));
  const firsts = examples ? starts(reading.whole(examples.counts)) : new Uint32Array(count + 1), letters = packed ? starts(packed.lengths) : null;
  const tokensOf = (name, at) => [...listed[name].tokens.subarray(listed[name].from[at], listed[name].from[at + 1])].map((id) => tokens[id]);
  function peaks(at) {
    const seen = new Map();
    for (let each = firsts[at]; each < firsts[at + 1] && packed.decile[each] === 0; each += 1) {
      const id = packed.tokens[letters[each] + packed.peak[each]];
      seen.set(id, (seen.get(id) ?? 0) + 1);
    }
    return [...seen].sort((a, b) => b[1] - a[1]).map(([id]) => id);
  }

  // latents with the token where they are active most, or that they promote, or with the name, or that stand for it
  function matches(query) {
    const wanted = query.toLowerCase(), spelled = new Uint8Array(tokens.length);
    tokens.forEach((text, id) => { if (text.toLowerCase().includes(wanted)) spelled[id] = 1; });
    const promoted = listed.promotes;
    return (at) => {
      if (columns.name[at].toLowerCase().includes(wanted) || columns.explanation?.[at].toLowerCase().includes(wanted)) return true;
      for (let each = promoted.from[at]; each < promoted.from[at + 1]; each += 1) if (spelled[promoted.tokens[each]]) return true;
      for (let each = firsts[at]; each < firsts[at + 1] && packed.decile[each] === 0; each += 1) if (spelled[packed.tokens[letters[each] + packed.peak[each]]]) return true;
      return false;
    };
  }
  function list() {
    const kept = state.query ? matches(state.query) : () => true, column = columns[state.sort];
    state.listed = [...Array(count).keys()].filter((at) => (!state.kind || columns.class[at] === state.kind) && kept(at));
    if (state.sort === "name") state.listed.sort((a, b) => columns.name[a].localeCompare(columns.name[b], undefined, { numeric: true }));
    // an effect is large whatever its sign
    else state.listed.sort((a, b) => Math.abs(column[b] ?? 0) - Math.abs(column[a] ?? 0) || a - b);
    found.textContent = state.listed.length === count ? "" : `${state.listed.length.toLocaleString("en-US")} of ${count.toLocaleString("en-US")} latents`;
    index.replaceChildren();
    state.shown = 0;
    longer();
  }
  const told = (at) => (state.sort === "name" || state.sort === "share" ? percent(columns.share[at]) : state.sort === "density" ? percent(columns.density[at]) : say(columns[state.sort][at], state.sort === "effect"));
  function longer() {
    index.append(...state.listed.slice(state.shown, state.shown + AT_ONCE).map((at) => {
      const words = packed ? peaks(at).slice(0, 6).map((id) => token(tokens[id])).join("  ") : "";
      const link = make("a", { href: `#${columns.name[at]}` }, make("span", { textContent: columns.name[at] }), make("span", { textContent: told(at) }), make("small", { textContent: words }));
      link.dataset.at = at;
      return make("li", {}, link);
    }));
    state.shown = Math.min(state.listed.length, state.shown + AT_ONCE);
    more.hidden = state.shown >= state.listed.length;
    mark();
  }
  // the latents before and behind the one that is shown, in the list as it is now; the first where it is not in it
  function around() {
    const by = state.listed.indexOf(state.at);
    return { Previous: state.listed[by - 1], Next: state.listed[by + 1] };
  }
  function mark() {
    for (const button of main.querySelectorAll(".steps button")) button.disabled = around()[button.textContent] === undefined;
    for (const link of index.querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
    index.querySelector(`[data-at="${state.at}"]`)?.setAttribute("aria-current", "true");
  }

  const fact = (name, value) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }));
  const chips = (texts) => make("ul", { className: "chips" }, ...texts.map((text) => make("li", { textContent: token(text) })));
  function histogram(at) {
    const counts = bars.counts[at], first = bars.first[at], most = Math.max(...counts), width = 300, height = 110, each = width / counts.length;
    const space = "http://www.w3.org/2000/svg", drawn = document.createElementNS(space, "svg");
    const [low, high] = [first, first + counts.length].map((bar) => 2 ** (LOWEST + bar / STEPS));
    const words = `Histogram of ${columns.active[at].toLocaleString("en-US")} activations from ${say(low)} to ${say(high)}, most in one bar ${most.toLocaleString("en-US")}`;
    for (const [name, value] of Object.entries({ viewBox: `0 0 ${width} ${height + 2}`, role: "img", "aria-label": words })) drawn.setAttribute(name, value);
    counts.forEach((n, bar) => {
      const shape = document.createElementNS(space, "rect"), tall = (n / most) * height;
      for (const [name, value] of Object.entries({ x: bar * each + 0.5, y: height - tall, width: Math.max(1, each - 1), height: tall })) shape.setAttribute(name, value);
      drawn.append(shape);
    });
    const line = document.createElementNS(space, "line");
    for (const [name, value] of Object.entries({ x1: 0, x2: width, y1: height + 1, y2: height + 1 })) line.setAttribute(name, value);
    drawn.append(line);
    return [drawn, make("p", { textContent: `Tokens by the activation, from ${say(low)} to ${say(high)}, ${STEPS} bars for each doubling; the highest bar has ${most.toLocaleString("en-US")}.` })];
  }
  function relations(at) {
    const rows = related[at];
    if (!rows.length) return [make("p", { textContent: "Active in too few tokens of the sample to say." })];
    const cell = (kind, name) => (kind === "latent" && places.has(name) ? make("a", { href: `#${name}`, textContent: name }) : name);
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...["with", "r"].map((text, i) => make("th", { textContent: text, className: i ? "n" : "", scope: "col" })))), make("tbody", {}, ...rows.map(([kind, name, r]) => make("tr", {}, make("td", {}, cell(kind, name)), make("td", { className: "n", textContent: say(r, true) })))));
    const by = Object.entries(chance[at]).map(([kind, r]) => `${say(r)} with ${kind}s`).join(", ");
    return [table, make("p", { textContent: `Pearson's correlation over random tokens: latents by their activation, heads by the norm of what they write.${by ? ` With the tokens shuffled the largest is ${by}.` : ""}` })];
  }
  function example(each) {
    const [accent, well] = ["accent", "ground"].map((name) => reading.channels(reading.colour(name)));
    const words = make("div", { className: "window", dir: "auto" });
    for (let at = letters[each]; at < letters[each + 1]; at += 1) {
      const text = tokens[packed.tokens[at]], level = packed.levels[at];
      const span = make("span", { textContent: text });
      if (level) {
        const strength = 0.12 + 0.88 * (level / 255), behind = accent.map((part, i) => Math.round(well[i] + strength * (part - well[i])));
        span.style.background = `rgb(${behind})`;
        span.style.color = reading.over(behind);
      }
      if (at - letters[each] === packed.peak[each]) span.className = "peak";
      words.append(span);
    }
    const where = `${examples.texts[packed.text[each]]}, token ${packed.position[each].toLocaleString("en-US")}`;
    return make("li", {}, make("b", { textContent: say(examples.value[each]) }), words, make("small", { textContent: where, title: where }));
  }
  function groups(at) {
    if (!packed) return [];
    const parts = new Map();
    for (let each = firsts[at]; each < firsts[at + 1]; each += 1) parts.set(packed.decile[each], [...(parts.get(packed.decile[each]) ?? []), each]);
    const named = (decile) => (decile ? `Random, tenth ${decile} of 10` : "Largest activations, each from another text");
    return [...parts].flatMap(([decile, own]) => [make("h4", { textContent: named(decile) }), make("ul", {}, ...own.map(example))]);
  }
  function show(at, { quiet = false } = {}) {
    state.at = at;
    const step = (text) => {
      const button = make("button", { type: "button", textContent: text });
      button.addEventListener("click", () => { window.location.hash = columns.name[around()[text]]; });
      return button;
    };
    const facts = [fact("active in", `${columns.active[at].toLocaleString("en-US")} tokens`), fact("density", percent(columns.density[at])), fact("share of Σ f²", percent(columns.share[at])), fact("largest", say(columns.largest[at]))];
    if (columns.effect && columns.effect[at] !== null) facts.push(fact("effect", say(columns.effect[at], true)));
    if (columns.class && columns.class[at]) facts.push(fact("class", columns.class[at]));
    const up = tokensOf("promotes", at), down = tokensOf("suppresses", at);
    const writes = up.length ? [make("h3", { textContent: "Promotes" }), chips(up), make("h3", { textContent: "Suppresses" }), chips(down)] : [make("h3", { textContent: "Writes" }), make("p", { textContent: "What it writes is no part of the residual stream: no tokens can be read off it." })];
    main.replaceChildren(
      make("div", { className: "steps" }, step("Previous"), step("Next")),
      make("h2", { textContent: columns.name[at] }),
      ...(columns.explanation?.[at] ? [make("p", { className: "stands-for", dir: "auto", textContent: `Stands for ${columns.explanation[at]}` })] : []),
      make("dl", { className: "facts" }, ...facts),
      make("div", { className: "beside" }, make("section", {}, make("h3", { textContent: "Activations" }), ...histogram(at)), make("section", {}, ...writes), make("section", {}, make("h3", { textContent: "Goes with" }), ...relations(at))),
      make("section", { className: "examples" }, make("h3", { textContent: "Examples" }), make("p", { className: "note", textContent: "The stronger the colour behind a token, the larger the activation there, as a share of the latent's largest; the underlined token is the example's own. Tenths are those of random activations." }), ...groups(at)),
    );
    mark();
    document.documentElement.dataset.charts = "drawn";
    document.title = `${columns.name[at]} · ${data.dictionary} · mechscope`;
    if (!quiet) {
      reading.live.textContent = `${columns.name[at]}, active in ${percent(columns.density[at])} of the tokens`;
      window.scrollTo(0, main.offsetTop > 200 ? main.offsetTop : 0);
    }
  }

  const labelled = (heading, box) => make("label", {}, make("span", { textContent: heading }), box);
  const choice = (heading, options, change) => {
    const box = make("select", { autocomplete: "off" }, ...options.map(([value, text]) => make("option", { value, textContent: text })));
    box.addEventListener("change", () => { change(box.value); list(); });
    return make("label", { className: "pick" }, make("span", { textContent: heading }), box);
  };
  const search = make("input", { type: "search", autocomplete: "off", placeholder: "a token, or resid6.f12" });
  search.addEventListener("input", () => { state.query = search.value.trim(); list(); });
  const sorts = [["share", "share of Σ f²"], ["density", "density"], ["largest", "largest activation"], ...(columns.effect ? [["effect", "effect"]] : []), ["name", "name"]];
  controls.append(labelled("Search", search), choice("Sort by", sorts, (value) => { state.sort = value; }));
  const kinds = [...new Set(columns.class ?? [])].filter(Boolean).sort();
  if (kinds.length) controls.append(choice("Class", [["", "all"], ...kinds.map((kind) => [kind, kind])], (value) => { state.kind = value; }));
  more.addEventListener("click", () => { const next = state.shown; longer(); index.children[next]?.querySelector("a").focus(); });
  const named = () => places.get(decodeURIComponent(window.location.hash.slice(1)));
  window.addEventListener("hashchange", () => { const at = named(); if (at !== undefined) show(at); });
  reading.night.addEventListener("change", () => show(state.at, { quiet: true }));
  list();
  show(named() ?? 0, { quiet: true });
})();
