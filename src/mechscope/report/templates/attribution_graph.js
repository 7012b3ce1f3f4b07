// The attribution graph: the edges of the node that is selected, what is known of it, pinned nodes, and groups that can be saved.
reading.each("attribution_graph", "[data-attribution-graph]", (card, graph) => {
  const { make, say, token } = reading;
  const svg = card.querySelector("svg"), stage = card.querySelector(".graph-scroll"), panel = card.querySelector(".graph-panel");
  const layer = svg.querySelector(".edges"), strongest = layer.innerHTML, places = [...svg.querySelectorAll(".node")];
  const numbers = new Map(graph.nodes.map(({ node }, at) => [node, at]));
  const into = graph.nodes.map(() => []), out = graph.nodes.map(() => []);
  graph.edges.forEach((edge, at) => { out[edge[0]].push(at); into[edge[1]].push(at); });
  const groups = graph.groups.map(({ name, nodes }) => ({ name, nodes: new Set(nodes.map((node) => numbers.get(node)).filter((at) => at !== undefined)), all: nodes }));
  const pinned = new Set();
  let chosen = null, group = null;

  const NS = "http://www.w3.org/2000/svg";
  function path([from, to, weight, share]) {
    const a = graph.nodes[from], b = graph.nodes[to], y1 = a.y - a.size, y2 = b.y + b.size, lift = 0.45 * (y1 - y2), line = document.createElementNS(NS, "path");
    line.setAttribute("class", `edge ${weight > 0 ? "adds" : "takes"}`);
    line.setAttribute("d", `M${a.x} ${y1}C${a.x} ${y1 - lift} ${b.x} ${y2 + lift} ${b.x} ${y2}`);
    line.setAttribute("stroke-width", (0.6 + 5 * share ** 0.6).toFixed(2));
    line.setAttribute("stroke-opacity", ".75");
    return line;
  }
  const nameOf = (at) => {
    const { kind, node, component, position, token: text } = graph.nodes[at];
    return kind === "logit" ? `next token “${token(text)}”` : kind === "token" ? `“${token(text)}” (${position})` : `${kind === "error" ? `${component} error` : component} at “${token(text)}” (${position})`;
  };

  // edges of one node or of a whole group, added up by the node at the other end
  function ends(members, edges, side) {
    const sums = new Map();
    for (const at of members) for (const number of edges[at]) {
      const edge = graph.edges[number];
      if (!members.has(edge[side])) sums.set(edge[side], (sums.get(edge[side]) ?? 0) + edge[2]);
    }
    return [...sums].sort((one, two) => Math.abs(two[1]) - Math.abs(one[1]));
  }
  function listed(heading, rows) {
    const line = ([at, weight]) => {
      const button = make("button", { type: "button", textContent: nameOf(at) });
      button.addEventListener("click", () => choose(at));
      return make("tr", {}, make("td", {}, button), make("td", { className: "n", textContent: say(weight, true) }));
    };
    const more = rows.length > 12 ? make("p", { textContent: `and ${rows.length - 12} smaller ones` }) : "";
    return make("div", {}, make("h4", { textContent: heading }), rows.length ? make("table", {}, make("tbody", {}, ...rows.slice(0, 12).map(line))) : make("p", { textContent: "nothing that is left in the graph" }), more);
  }
  function about() {
    if (group !== null) return [make("h4", { textContent: `Group ${groups[group].name}` }), make("p", { textContent: [...groups[group].nodes].map(nameOf).join(", ") || "none of its nodes is in this picture" })];
    const node = graph.nodes[chosen], held = graph.details[node.component];
    const facts = [node.node, node.value === null ? "" : `value ${say(node.value)}`, node.probability === null ? "" : `probability ${say(node.probability)}`, node.kind === "logit" ? "" : `influence ${say(node.influence)}`];
    const parts = [make("h4", { textContent: nameOf(chosen) }), make("p", { textContent: facts.filter(Boolean).join(" · ") })];
    if (held && node.kind === "latent") {
      parts.push(make("p", { textContent: `Promotes ${held.promotes.map(token).join(", ")}; suppresses ${held.suppresses.map(token).join(", ")}.` }));
      for (const [value, before, text, after] of held.examples) parts.push(make("p", {}, `${say(value)}  …${before}`, make("mark", { textContent: text }), `${after}…`));
    }
    return parts;
  }
  function tools() {
    const name = make("input", { type: "text", "aria-label": "Name of a new group", placeholder: "name of the group", autocomplete: "off" });
    const put = make("button", { type: "button", textContent: "Group the pinned nodes" }), save = make("button", { type: "button", textContent: "Save groups" });
    put.disabled = !pinned.size;
    save.disabled = !groups.length;
    put.addEventListener("click", () => {
      let title = name.value.trim() || `group ${groups.length + 1}`;
      while (groups.some((one) => one.name === title)) title += "′";
      groups.push({ name: title, nodes: new Set(pinned), all: [...pinned].map((at) => graph.nodes[at].node) });
      pinned.clear();
      [group, chosen] = [groups.length - 1, null];
      show();
    });
    save.addEventListener("click", () => {
      const held = { prompt: graph.prompt, groups: groups.map((one) => ({ name: one.name, nodes: one.all })) };
      const link = make("a", { href: URL.createObjectURL(new Blob([JSON.stringify(held, null, 1)], { type: "application/json" })), download: "groups.json" });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    const pins = [...pinned].map((at) => {
      const button = make("button", { type: "button", textContent: `${nameOf(at)} ×`, "aria-label": `unpin ${nameOf(at)}` });
      button.addEventListener("click", () => { pinned.delete(at); show(); });
      return button;
    });
    const each = groups.map((one, at) => {
      const open = make("button", { type: "button" }, make("span", { className: "swatch" }), one.name), drop = make("button", { type: "button", textContent: "×", "aria-label": `dissolve ${one.name}` });
      open.firstChild.style.borderColor = graph.rings[at % graph.rings.length];
      open.addEventListener("click", () => { [group, chosen] = [at, null]; show(); });
      drop.addEventListener("click", () => { groups.splice(at, 1); group = null; show(); });
      return make("span", {}, open, drop);
    });
    const pin = make("button", { type: "button", textContent: pinned.has(chosen) ? "Unpin (p)" : "Pin (p)" });
    pin.disabled = chosen === null;
    pin.addEventListener("click", toggle);
    return make("div", { className: "about" }, make("p", {}, pin, name, put, save), pins.length ? make("p", {}, "Pinned: ", ...pins) : "", each.length ? make("p", {}, "Groups: ", ...each) : "");
  }

  function rings() {
    for (const old of svg.querySelectorAll(".ring")) old.remove();
    groups.forEach((one, number) => {
      for (const at of one.nodes) {
        const circle = document.createElementNS(NS, "circle"), ring = document.createElementNS(NS, "g");
        ring.setAttribute("class", "ring");
        for (const [key, value] of Object.entries({ r: graph.nodes[at].size + 3 + 2.6 * (number % 2), fill: "none", stroke: graph.rings[number % graph.rings.length], "stroke-width": 2.2 })) circle.setAttribute(key, value);
        ring.append(circle);
        places[at].prepend(ring);
      }
    });
  }
  function show() {
    const members = group !== null ? groups[group].nodes : chosen === null ? new Set() : new Set([chosen]);
    svg.classList.toggle("picked", members.size > 0);
    const own = new Set([...members].flatMap((at) => [...into[at], ...out[at]])), near = new Set([...own].flatMap((number) => graph.edges[number].slice(0, 2)));
    places.forEach((place, at) => {
      place.classList.toggle("chosen", members.has(at));
      place.classList.toggle("near", near.has(at));
      place.classList.toggle("pinned", pinned.has(at));
    });
    if (members.size) layer.replaceChildren(...[...own].reverse().map((number) => path(graph.edges[number])));
    else layer.innerHTML = strongest;
    rings();
    const parts = members.size || group !== null ? [make("div", {}, ...about()), listed("Reads", ends(members, into, 0)), listed("Is read by", ends(members, out, 1))] : [];
    panel.replaceChildren(tools(), ...parts);
    panel.hidden = false;
    card.dataset.chosen = chosen === null ? "" : graph.nodes[chosen].node;
    if (chosen !== null) reading.live.textContent = `${nameOf(chosen)}, ${into[chosen].length} edges in, ${out[chosen].length} out`;
  }
  function choose(at) {
    [chosen, group] = [at, null];
    show();
    if (at === null) return;
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width, x = graph.nodes[at].x * scale, y = graph.nodes[at].y * scale;
    if (x < stage.scrollLeft + 30 || x > stage.scrollLeft + stage.clientWidth - 30) stage.scrollLeft = x - stage.clientWidth / 2;
    if (y < stage.scrollTop + 20 || y > stage.scrollTop + stage.clientHeight - 20) stage.scrollTop = y - stage.clientHeight / 2;
  }
  function toggle() {
    if (chosen === null) return;
    pinned.has(chosen) ? pinned.delete(chosen) : pinned.add(chosen);
    show();
  }

  // the nearest node in a direction, one step to the side counting as much as half a step ahead
  function next(dx, dy) {
    const first = graph.nodes.findIndex(({ kind }) => kind === "logit");
    if (chosen === null) return first;
    const from = graph.nodes[chosen];
    let [best, found] = [Infinity, chosen];
    graph.nodes.forEach((to, at) => {
      const ahead = dx * (to.x - from.x) + dy * (to.y - from.y), aside = Math.abs(dy * (to.x - from.x) + dx * (to.y - from.y));
      if (at !== chosen && ahead > 2 && ahead + 2 * aside < best) [best, found] = [ahead + 2 * aside, at];
    });
    return found;
  }
  stage.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) choose(next(...moves[event.key]));
    else if (event.key === "p") toggle();
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
  });
  svg.addEventListener("click", (event) => {
    const place = event.target.closest(".node");
    choose(place ? Number(place.dataset.at) : null);
  });
  show();
  stage.scrollLeft = stage.scrollWidth; // the next tokens stand on the right
  document.documentElement.dataset.graph = "drawn";
});
