"use strict";
(() => {
  const { figures, datasets, light, dark } = JSON.parse(document.getElementById("charts").textContent);
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const drawn = new Map(); // of a place: its view, and how many columns its legend has
  let kind = document.querySelector("input[name=query-rows]:checked")?.value;

  const rowsOf = ({ columns, rows }) => rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));
  // how many columns a legend may have; on a telephone also what else must give way
  const roomFor = (place) => (place.clientWidth > 560 ? 4 : place.clientWidth > 400 ? 3 : 2);
  function narrow(part, most) {
    if (part.labelLimit > most) part.labelLimit = most;
    for (const inner of Object.values(part)) if (inner && typeof inner === "object") narrow(inner, most);
  }

  // a legend wider than its chart would be cut off
  function sticksOut(place) {
    const edge = place.getBoundingClientRect().right + 1;
    return [...place.querySelectorAll(".role-legend-label text")].some((label) => label.getBoundingClientRect().right > edge);
  }

  // the angle at which the names under a chart stand side by side; undefined where they do as they are
  function slant(place) {
    for (const group of place.querySelectorAll(".role-axis-label")) {
      const labels = [...group.querySelectorAll("text")].filter((label) => label.getAttribute("opacity") !== "0").map((label) => ({ box: label.getBoundingClientRect(), at: label.getScreenCTM() }));
      if (labels.length < 2 || Math.abs(labels[0].at.f - labels[1].at.f) > 0.5) continue;
      const pitch = Math.abs(labels[1].at.e - labels[0].at.e), slanted = Math.abs(labels[0].at.b) > 0.01;
      const upright = Math.abs(labels[0].at.a) < 0.1, cut = labels[0].box.left < place.getBoundingClientRect().left - 1;
      if (slanted ? !upright && (cut || pitch < 15) : labels.some(({ box }, i) => i && labels[i - 1].box.right > box.left + 1)) return slanted || pitch < 15 ? -90 : -45;
    }
    return undefined;
  }
  function turn(part, angle) {
    if (part.x?.axis) part.x.axis.labelAngle = angle;
    for (const inner of Object.values(part)) if (inner && typeof inner === "object") turn(inner, angle);
  }

  async function draw(place, columns = roomFor(place), angle = undefined) {
    const name = place.dataset.figure, figure = place.closest("figure");
    const spec = structuredClone(figures[name]);
    spec.datasets = Object.fromEntries(spec.datasets.map((id) => [id, rowsOf(datasets[id])]));
    for (const parameter of spec.params ?? []) if (parameter.name === "query_rows" && kind) parameter.value = kind;
    if (angle) turn(spec, angle);
    const config = structuredClone(night.matches ? dark : light);
    Object.assign(config.legend, { columns });
    Object.assign(config, { aria: false, mark: { aria: false } }); // one picture with one name for a screen reader, not thousands of marks: the numbers are in the tables
    if (roomFor(place) === 2) {
      for (const each of [spec, config]) narrow(each, Math.round(0.45 * place.clientWidth));
      config.axisX = { titleAnchor: "end" };
    }
    drawn.get(place)?.view?.finalize();
    drawn.set(place, { room: roomFor(place), columns, angle });
    place.classList.remove("failed");
    try {
      const { view } = await vegaEmbed(place, spec, {
        ast: true, // interpreted expressions: the page's policy allows no eval
        renderer: "svg",
        config,
        actions: { export: true, source: false, compiled: false, editor: false },
        tooltip: { theme: night.matches ? "dark" : "light" },
        downloadFileName: name,
      });
      drawn.get(place).view = view;
      const title = figure.querySelector("h3").textContent, caption = figure.querySelector("figcaption"), svg = place.querySelector("svg.marks");
      caption.id ||= `${name}-caption`;
      svg.removeAttribute("aria-hidden");
      for (const [attribute, value] of [["role", "img"], ["aria-label", `Chart: ${title}`], ["aria-describedby", caption.id]]) svg.setAttribute(attribute, value);
      place.querySelector("summary")?.setAttribute("aria-label", `Save the chart: ${title}`);
    } catch (error) {
      drawn.get(place).failed = true;
      place.textContent = `This chart could not be drawn (${error.message}). The file figures/${name}.svg shows it.`;
      place.classList.add("failed");
    }
    if (columns > 1 && sticksOut(place)) await draw(place, columns - 1, angle);
    else if (!angle && slant(place)) await draw(place, columns, slant(place));
  }

  // The charts wait here and are drawn one by one, nearest to what is on the screen first; between two the browser can paint and answer.
  const waiting = new Set();
  let working = false;
  const distance = (place) => {
    const { top, bottom } = place.getBoundingClientRect();
    return Math.max(top - window.innerHeight, -bottom);
  };
  async function work() {
    if (working) return;
    working = true;
    delete root.dataset.charts;
    while (true) {
      await new Promise((done) => setTimeout(done));
      // one that is folded away has no width yet; it comes back when it is opened
      for (const place of waiting) if (!place.clientWidth) waiting.delete(place);
      if (!waiting.size) break;
      const [, next] = [...waiting].map((place) => [distance(place), place]).reduce((a, b) => (b[0] < a[0] ? b : a));
      waiting.delete(next);
      await draw(next);
    }
    const failures = [...drawn.values()].filter(({ failed }) => failed).length;
    root.dataset.charts = failures ? `failed ${failures}` : "drawn";
    working = false;
  }
  const later = (places) => {
    for (const place of places) waiting.add(place);
    work();
  };
  // a chart grows and shrinks with its place by itself, a moment later; its legend does not
  const misfit = (place) => {
    const state = drawn.get(place);
    return place.clientWidth && (!state || state.room !== roomFor(place) || (state.columns > 1 && sticksOut(place)) || (!state.angle && slant(place)));
  };
  const sizes = new ResizeObserver((entries) => setTimeout(() => {
    const places = entries.map(({ target }) => target).filter(misfit);
    if (places.length) later(places);
  }, 200));

  function show(wanted) {
    kind = wanted;
    for (const element of document.querySelectorAll("[data-rows]")) element.hidden = element.dataset.rows !== kind;
    for (const { view } of drawn.values()) {
      // not every chart is about query rows
      if (view && "query_rows" in (view.getState({ signals: (name) => name === "query_rows" }).signals ?? {})) view.signal("query_rows", kind).runAsync();
    }
  }

  function sort(heading) {
    const table = heading.closest("table"), column = heading.cellIndex, body = table.tBodies[0];
    const up = heading.getAttribute("aria-sort") === "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.sort;
    const text = (row) => row.cells[column].textContent;
    const compare = (a, b) => {
      // what has no number stays below, whichever way the numbers run
      if (key(a) === undefined || key(b) === undefined) {
        if (key(a) !== key(b)) return key(a) === undefined ? 1 : -1;
        return (up ? 1 : -1) * text(a).localeCompare(text(b), undefined, { numeric: true });
      }
      return (up ? 1 : -1) * (Number(key(a)) - Number(key(b)));
    };
    body.append(...[...body.rows].sort(compare));
  }

  for (const card of document.querySelectorAll("[data-most]")) card.querySelector(".chart").style.maxWidth = `${card.dataset.most}px`;
  for (const input of document.querySelectorAll("input[name=query-rows]")) input.addEventListener("change", () => show(input.value));
  for (const heading of document.querySelectorAll(".sortable thead th")) heading.querySelector("button").addEventListener("click", () => sort(heading));

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    const current = entries.find((entry) => entry.isIntersecting);
    if (!current) return;
    for (const [id, link] of links) id === current.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const section of document.querySelectorAll("main section")) seen.observe(section);

  const places = document.querySelectorAll("[data-figure]");
  night.addEventListener("change", () => later(drawn.keys()));
  later(places);
  for (const place of places) sizes.observe(place);
})();
