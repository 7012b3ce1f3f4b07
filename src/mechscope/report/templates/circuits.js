(() => {
  const held = document.getElementById("circuits");
  if (!held) return;
  const { grid, models } = JSON.parse(held.textContent);
  const told = new WeakMap(); // what hovering over an element says
  const tip = document.createElement("div");
  tip.className = "circuit-tip";
  tip.hidden = true;
  document.body.append(tip);

  const count = (n) => n.toLocaleString("en-US");
  // as `theme.number` writes them
  function say(x, sign = false) {
    if (x === null || x === undefined) return "–";
    const size = Math.abs(x);
    const text = size && size < 1e-4 ? x.toExponential(2) : x.toFixed(Math.max(0, 2 - (size ? Math.floor(Math.log10(size)) : 0)));
    return `${sign && x >= 0 ? "+" : ""}${text}`.replaceAll("-", "−");
  }
  const interval = (low, high, sign = false) => (typeof low === "number" && typeof high === "number" ? ` [${say(low, sign)}, ${say(high, sign)}]` : "");
  const owner = (receiver) => receiver.split("<")[0];

  // the rules of `Grid.path`
  function path(places, sender, receiver) {
    let [x1, y1] = places[sender], [x2, y2] = places[owner(receiver)];
    x2 += (grid.ports[receiver.split("<")[1]?.[0]] ?? 0) * grid.box[0];
    if (sender === "input") x1 += (x2 - x1) * grid.fan;
    if (receiver === "logits") x2 += (x1 - x2) * grid.fan;
    y1 -= grid.box[1] / 2;
    y2 += grid.box[1] / 2;
    const bow = Math.abs(x2 - x1) < 0.6 * grid.pitch && y1 - y2 > grid.rise ? 0.6 * grid.pitch * (x1 < grid.centre ? 1 : -1) : 0;
    const lift = 0.42 * (y1 - y2), at = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;
    return `M${at(x1, y1)}C${at(x1 + bow, y1 - lift)} ${at(x2 + bow, y2 + lift)} ${at(x2, y2)}`;
  }

  // faithfulness at a number of edges, between the measured sizes by the logarithm; null below the smallest and above the largest
  function measured(curve, edges) {
    const after = curve.edges.findIndex((size) => size >= edges);
    if (after < 0 || (after === 0 && curve.edges[0] > edges)) return null;
    if (curve.edges[after] === edges) return { from: edges, to: edges, at: (column) => curve[column][after] };
    const [from, to] = [curve.edges[after - 1], curve.edges[after]], share = Math.log(edges / from) / Math.log(to / from);
    const at = (column) => {
      const [a, b] = [curve[column][after - 1], curve[column][after]];
      return a === null || b === null ? null : a + share * (b - a);
    };
    return { from, to, at };
  }

  function bind(card, model) {
    const svg = card.querySelector("svg.circuit"), chosen = svg.querySelector(".edges"), mark = card.querySelector(".mark");
    const drawn = chosen.cloneNode(false), nodes = [...svg.querySelectorAll(".node")], shownFirst = nodes.filter((node) => !node.hasAttribute("display"));
    const [size, faithful, random, note] = ["size", "faithful", "random", "note"].map((name) => card.querySelector(`[data-${name}]`));
    const first = [size, faithful, random, note].map((place) => place.textContent), markFirst = mark?.getAttribute("d");
    const slider = card.querySelector("input"), button = card.querySelector("button");
    const largest = Math.abs(model.score[0]) || 1;

    for (const element of svg.querySelectorAll(".edge, .node")) {
      const title = element.querySelector("title");
      told.set(element, title.textContent);
      title.remove(); // the browser's own hint would stand beside the page's
    }
    chosen.after(drawn);

    function edge(i) {
      const sender = model.names[model.sender[i]], receiver = model.names[model.receiver[i]], score = model.score[i];
      const strength = Math.min(1, Math.abs(score) / largest), element = document.createElementNS(svg.namespaceURI, "path");
      element.setAttribute("class", `edge ${score < 0 ? "holds" : "harms"}`);
      element.setAttribute("data-ends", `${sender} ${receiver}`);
      element.setAttribute("d", path(model.places, sender, receiver));
      element.setAttribute("stroke", score < 0 ? grid.holds : grid.harms);
      element.setAttribute("stroke-width", (grid.thinnest + (grid.widest - grid.thinnest) * strength).toFixed(3));
      element.setAttribute("stroke-opacity", (0.4 + 0.5 * strength).toFixed(2));
      const q = model.q?.[i] ?? null;
      told.set(element, `${sender}->${receiver}\nscore ${say(score, true)}${interval(model.low?.[i], model.high?.[i], true)}${q === null ? "" : `, q = ${say(q)}`}`);
      return element;
    }

    function reveal(isShown) {
      for (const node of nodes) isShown(node) ? node.removeAttribute("display") : node.setAttribute("display", "none");
    }

    function strongest(edges) {
      const order = [...Array(edges).keys()].reverse(), touched = new Set();
      for (const i of order) touched.add(model.names[model.sender[i]]).add(owner(model.names[model.receiver[i]]));
      chosen.setAttribute("display", "none");
      drawn.replaceChildren(...order.map(edge));
      reveal((node) => touched.has(node.dataset.node));
      size.textContent = `The ${count(edges)} strongest of ${count(model.total)} edges (${((100 * edges) / model.total).toFixed(2)}\u202f%), ${count(touched.size - touched.has("logits"))} nodes`;
      slider.setAttribute("aria-valuetext", `${count(edges)} edges`);
      const found = model.curve && measured(model.curve, edges);
      faithful.textContent = found ? `${say(found.at("faithfulness"))}${interval(found.at("low"), found.at("high"))}` : "not measured";
      random.textContent = found ? `${say(found.at("random"))}${interval(found.at("random_low"), found.at("random_high"))}` : "not measured";
      note.textContent = !found ? "" : found.from === found.to ? "Measured at this size." : `Between the measured sizes of ${count(found.from)} and ${count(found.to)} edges.`;
      if (mark) {
        const x = Math.min(model.axis.to, Math.max(model.axis.from, model.axis.left + model.axis.scale * Math.log(edges)));
        mark.setAttribute("d", mark.getAttribute("d").replace(/^M\S+/, `M${x.toFixed(1)}`));
      }
    }

    function back() {
      drawn.replaceChildren();
      chosen.removeAttribute("display");
      reveal((node) => shownFirst.includes(node));
      [size, faithful, random, note].forEach((place, i) => { place.textContent = first[i]; });
      mark?.setAttribute("d", markFirst);
      slider.value = model.start;
    }

    slider.addEventListener("input", () => strongest(model.stops[slider.valueAsNumber]));
    button.addEventListener("click", back);
    slider.value = model.start; // a browser keeps the place over a reload
    for (const control of card.querySelectorAll(".steer")) control.hidden = false;

    const dark = () => {
      svg.classList.remove("dim");
      for (const lit of svg.querySelectorAll(".lit")) lit.classList.remove("lit");
      tip.hidden = true;
    };
    // a thin line is hard to meet: what lies a few pixels beside the pointer counts too
    const near = [[0, 0], [0, 3], [3, 0], [0, -3], [-3, 0], [5, 5], [-5, -5], [5, -5], [-5, 5]];
    function point(event) {
      let met = null;
      for (const [dx, dy] of near) {
        met = document.elementFromPoint(event.clientX + dx, event.clientY + dy)?.closest(".edge, .node") ?? null;
        if (met && svg.contains(met)) break;
      }
      dark();
      if (!met || !svg.contains(met)) return;
      const node = met.dataset.node;
      svg.classList.add("dim");
      met.classList.add("lit");
      if (node) for (const each of svg.querySelectorAll(".edge")) if (each.dataset.ends.split(" ").some((end) => owner(end) === node)) each.classList.add("lit");
      tip.textContent = told.get(met) ?? "";
      tip.hidden = false;
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
    }
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", dark);
  }

  const cards = [...document.querySelectorAll("[data-circuit]")];
  cards.forEach((card, i) => bind(card, models[i]));
  const which = document.querySelector(".which");
  if (which) {
    const pick = (i) => cards.forEach((card, at) => { card.hidden = at !== i; });
    which.querySelectorAll("input").forEach((input, i) => {
      input.checked = i === 0;
      input.addEventListener("change", () => pick(i));
    });
    which.hidden = false;
    pick(0);
  }
  document.documentElement.dataset.circuits = "drawn";
})();
