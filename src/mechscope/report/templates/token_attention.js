reading.each("token_attention", "[data-token-attention]", (card, { models, texts, power, tokens: spelled }) => {
  const { make, say, token } = reading;
  const state = { text: 0, head: 0, query: 0 };
  let tokens, panels, heads, edges;

  // keys and weights of every query of a head, per model
  const unpacked = new Map();
  function opened(text, head) {
    const name = `${text} ${head}`;
    if (!unpacked.has(name)) {
      unpacked.set(name, texts[text].heads[head].models.map((model) => {
        const counts = reading.whole(model.counts), starts = new Uint32Array(counts.length + 1);
        counts.forEach((count, i) => { starts[i + 1] = starts[i] + count; });
        return { starts, keys: reading.whole(model.keys), weights: reading.measured(model.weights, power) };
      }));
    }
    return unpacked.get(name);
  }
  const keysOf = ({ starts, keys, weights }, query) => Array.from({ length: starts[query + 1] - starts[query] }, (_, i) => [keys[starts[query] + i], weights[starts[query] + i]]);
  // a query worth looking at: in the summary if there is one, of strong attention to neither itself nor the first token
  function telling() {
    const summary = reading.whole(texts[state.text].segment).indexOf(spelled.indexOf("summary"));
    let [best, at] = [-1, tokens.length - 1];
    for (const model of edges) {
      // with few keys to choose from any query's attention is strong
      for (let query = summary > 0 ? summary : Math.floor(tokens.length / 4); query < tokens.length; query += 1) for (const [key, weight] of keysOf(model, query)) if (key && key !== query && weight > best) [best, at] = [weight, query];
    }
    return at;
  }

  const strip = make("canvas", { className: "strip", "aria-hidden": "true" }), flows = make("div", { className: "flows" });
  const listed = make("div", { className: "keys" }), controls = make("div", { className: "reading-controls" });

  function show(query) {
    const [accent, well] = ["accent", "well"].map((name) => reading.channels(reading.colour(name)));
    panels.forEach(({ spans, lit }, model) => {
      for (const span of lit.splice(0)) {
        span.removeAttribute("style");
        span.classList.remove("query");
      }
      for (const [key, weight] of keysOf(edges[model], query)) {
        const strength = 0.1 + 0.9 * weight ** 0.7, span = spans[key];
        const behind = accent.map((part, i) => Math.round(well[i] + strength * (part - well[i])));
        span.style.background = `rgb(${behind})`;
        span.style.color = reading.over(behind);
        lit.push(span);
      }
      spans[query].classList.add("query");
      lit.push(spans[query]);
    });
    const weights = edges.map((model) => new Map(keysOf(model, query)));
    const every = [...new Set(weights.flatMap((own) => [...own.keys()]))].sort((a, b) => Math.max(...weights.map((own) => own.get(b) ?? 0)) - Math.max(...weights.map((own) => own.get(a) ?? 0)) || a - b);
    const line = (key) => make("tr", {}, make("td", {}, make("b", { textContent: token(spelled[tokens[key]]) })), make("td", { className: "n", textContent: key }), ...weights.map((own) => {
      const bar = make("i", {}), place = make("td", { className: "n" }, own.has(key) ? say(own.get(key)) : "–", bar);
      bar.style.width = `${Math.round(100 * (own.get(key) ?? 0))}%`;
      return place;
    }));
    const head = make("tr", {}, ...["key", "position", ...(models.length > 1 ? models : ["weight"])].map((text, i) => make("th", { textContent: text, className: i ? "n" : "", scope: "col" })));
    const spread = weights.map((own) => [...own.values()].reduce((a, b) => a + b, 0)).map((sum) => say(Math.min(1, sum)));
    listed.replaceChildren(
      make("p", {}, "Query ", make("b", { textContent: token(spelled[tokens[query]]) }), ` at position ${query}. The keys listed have ${spread.join(" and ")} of its attention.`),
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...every.slice(0, 8).map(line))),
    );
    map(query);
    card.dataset.query = query;
  }
  // where in the text the keys are: a row per model
  function map(query) {
    const width = Math.max(200, flows.clientWidth), row = 15, height = models.length * row + 6, context = reading.sized(strip, width, height), step = width / tokens.length;
    const [accent, line, ink] = ["accent", "line", "ink"].map(reading.colour);
    edges.forEach((model, i) => {
      context.fillStyle = line;
      context.globalAlpha = 0.5;
      context.fillRect(0, 3 + i * row, width, row - 3);
      context.fillStyle = accent;
      for (const [key, weight] of keysOf(model, query)) {
        context.globalAlpha = 0.2 + 0.8 * weight ** 0.7;
        context.fillRect(key * step, 3 + i * row, Math.max(2, step), row - 3);
      }
    });
    context.globalAlpha = 1;
    context.fillStyle = ink;
    context.fillRect(query * step, 0, Math.max(2, step), height);
  }
  // inside its box only; the page stays where it is
  function reveal(query) {
    for (const { flow, spans } of panels) {
      const above = spans[query].offsetTop;
      if (above < flow.scrollTop + 20 || above > flow.scrollTop + flow.clientHeight - 40) flow.scrollTop = above - flow.clientHeight / 2;
    }
  }
  function choose(query, { quiet = false } = {}) {
    state.query = Math.max(0, Math.min(tokens.length - 1, query));
    show(state.query);
    reveal(state.query);
    if (!quiet) reading.live.textContent = listed.textContent;
  }

  function panel(name, i) {
    const segments = reading.whole(texts[state.text].segment), flow = make("div", { className: "flow", tabIndex: 0, role: "group", "aria-label": `Tokens, ${name}; arrow keys choose the query` }), spans = [];
    tokens.forEach((id, position) => {
      if (segments[position] && (!position || segments[position] !== segments[position - 1])) flow.append(make("em", { textContent: spelled[segments[position]] }));
      const span = make("span", { textContent: spelled[id] });
      span.dataset.at = position;
      flow.append(span);
      if (spelled[id].endsWith("↵")) flow.append(make("br"));
      spans.push(span);
    });
    const at = (event) => event.target.closest("[data-at]")?.dataset.at;
    flow.addEventListener("pointerover", (event) => at(event) !== undefined && show(Number(at(event))));
    flow.addEventListener("pointerleave", () => show(state.query));
    flow.addEventListener("click", (event) => at(event) !== undefined && choose(Number(at(event))));
    flow.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -tokens.length, End: tokens.length };
      if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      choose(state.query + moves[event.key]);
    });
    flow.addEventListener("scroll", () => { for (const other of panels) if (other.flow !== flow) other.flow.scrollTop = flow.scrollTop; });
    return { flow, spans, lit: [], place: make("div", {}, ...(models.length > 1 ? [make("h4", { textContent: models[i] })] : []), flow) };
  }
  function open() {
    tokens = reading.whole(texts[state.text].token);
    edges = opened(state.text, state.head);
    panels = models.map(panel);
    flows.replaceChildren(...panels.map(({ place }) => place));
    choose(telling(), { quiet: true });
  }
  function offer() {
    const named = texts[state.text].heads.map(({ name, role }) => (role ? `${name} (${role})` : name));
    const next = reading.select("Head", named, (head) => {
      state.head = head;
      edges = opened(state.text, head);
      choose(state.query);
    });
    heads?.replaceWith(next);
    heads = next;
  }

  offer();
  if (texts.length > 1) controls.append(reading.select("Text", texts.map(({ text }) => text), (text) => { Object.assign(state, { text, head: 0 }); offer(); open(); }));
  controls.append(heads);
  card.querySelector(".stage").append(controls, strip, flows, listed);
  strip.addEventListener("click", (event) => choose(Math.floor((event.offsetX / strip.clientWidth) * tokens.length)));
  reading.night.addEventListener("change", () => show(state.query));
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    map(state.query);
  }).observe(flows);
  open();
  document.documentElement.dataset.attention = "drawn";
});
