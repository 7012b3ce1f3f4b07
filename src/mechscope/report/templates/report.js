"use strict";
(() => {
  const { figures, datasets, light, dark } = JSON.parse(document.getElementById("charts").textContent);
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  let kind = document.querySelector("input[name=query-rows]:checked")?.value;

  const rowsOf = ({ columns, rows }) => rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));

  async function draw() {
    const root = document.documentElement;
    const colours = night.matches ? dark : light;
    let failures = 0;
    for (const place of document.querySelectorAll("[data-figure]")) {
      const name = place.dataset.figure;
      views.get(name)?.finalize();
      const spec = structuredClone(figures[name]);
      spec.datasets = Object.fromEntries(spec.datasets.map((id) => [id, rowsOf(datasets[id])]));
      for (const parameter of spec.params ?? []) if (parameter.name === "query_rows" && kind) parameter.value = kind;
      try {
        const { view } = await vegaEmbed(place, spec, {
          ast: true, // interpreted expressions: the page's policy allows no eval
          renderer: "svg",
          config: { ...colours, legend: { ...colours.legend, columns: place.clientWidth > 560 ? 4 : 2 } },
          actions: { export: true, source: false, compiled: false, editor: false },
          tooltip: { theme: night.matches ? "dark" : "light" },
          downloadFileName: name,
        });
        views.set(name, view);
      } catch (error) {
        failures += 1;
        place.textContent = `This chart could not be drawn (${error.message}). The file figures/${name}.svg shows it.`;
        place.classList.add("failed");
      }
    }
    root.dataset.charts = failures ? `failed ${failures}` : "drawn";
  }

  function show(wanted) {
    kind = wanted;
    for (const element of document.querySelectorAll("[data-rows]")) element.hidden = element.dataset.rows !== kind;
    for (const view of views.values()) {
      // not every chart is about query rows
      if ("query_rows" in (view.getState({ signals: (name) => name === "query_rows" }).signals ?? {})) view.signal("query_rows", kind).runAsync();
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
  for (const heading of document.querySelectorAll(".sortable th")) heading.querySelector("button").addEventListener("click", () => sort(heading));

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    const current = entries.find((entry) => entry.isIntersecting);
    if (!current) return;
    for (const [id, link] of links) id === current.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const section of document.querySelectorAll("main section")) seen.observe(section);

  night.addEventListener("change", draw);
  draw();
})();
