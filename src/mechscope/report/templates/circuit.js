// The slider of a circuit: shows what was drawn for each number of edges and says what was written for it.
(() => {
  const held = document.getElementById("circuit-data");
  if (!held) return;
  const models = JSON.parse(held.textContent).flat();
  const said = new WeakMap(); // what hovering over an element says
  const tip = document.createElement("div");
  tip.className = "circuit-tip";
  tip.hidden = true;
  document.body.append(tip);

  function bind(card, model) {
    const svg = card.querySelector("svg.circuit"), mark = card.querySelector(".mark");
    const slider = card.querySelector("input"), button = card.querySelector("button");
    const steps = svg.querySelectorAll(".edges > g, .node"), edgesOf = new Map();

    for (const element of svg.querySelectorAll(".edge, .node")) {
      const title = element.querySelector("title"), name = title.textContent.split("\n")[0];
      said.set(element, title.textContent);
      title.remove(); // the browser's own hint would stand beside the page's
      if (!element.dataset.node) for (const end of name.split("->")) {
        const node = end.split("<")[0];
        edgesOf.has(node) ? edgesOf.get(node).push(element) : edgesOf.set(node, [element]);
      }
    }

    function say({ size, faithful, random, note, mark: at }) {
      Object.entries({ size, faithful, random, note }).forEach(([name, words]) => { card.querySelector(`[data-${name}]`).textContent = words; });
      mark?.setAttribute("transform", `translate(${at} 0)`);
    }

    function strongest(stop) {
      // what no stop shows has no number, and is not smaller than any
      for (const step of steps) Number(step.dataset.from) <= stop.edges ? step.removeAttribute("display") : step.setAttribute("display", "none");
      svg.classList.add("moved");
      slider.setAttribute("aria-valuetext", `${stop.edges} edges`);
      say(stop);
    }

    function back() {
      for (const step of steps) step.removeAttribute("display");
      svg.classList.remove("moved");
      slider.value = model.start;
      slider.removeAttribute("aria-valuetext");
      say(model.chosen);
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
      svg.classList.add("dim");
      met.classList.add("lit");
      for (const edge of edgesOf.get(met.dataset.node) ?? []) edge.classList.add("lit");
      tip.textContent = said.get(met) ?? "";
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
  const which = document.querySelector("[data-circuit-of]");
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
