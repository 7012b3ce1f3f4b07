reading.each("lens_grid", "[data-lens-grid]", (card, { grids, power, top, tokens: spelled }, number) => {
  const { make, say, token } = reading;
  const measures = [
    { key: "probability", label: "probability of the next token", unit: "" },
    { key: "rank", label: "rank of the next token", unit: "" },
    { key: "entropy", label: "entropy", unit: " nats" },
    { key: "kl", label: "KL to the final prediction", unit: " nats" },
  ];
  const spans = [12, 24, 64, 128];
  const state = { at: 0, mode: 0, measure: measures[0], span: 12, start: 0, cursor: null };
  let grid, shown, box;

  const unpacked = new Map();
  function opened(at) {
    if (!unpacked.has(at)) {
      const packed = grids[at], [tokens, targets, segments] = [packed.token, packed.target, packed.segment].map(reading.whole);
      const models = packed.models.map((model) => {
        const own = { name: model.name, likeliest: reading.whole(model.likeliest), shares: reading.measured(model.shares, power), tops: model.tops };
        for (const key of ["probability", "entropy", "kl"]) own[key] = reading.measured(model[key], power);
        own.rank = Float32Array.from(reading.whole(model.rank), (rank) => rank || NaN);
        return own;
      });
      unpacked.set(at, { ...packed, tokens, targets, segments, models, n: packed.positions.length });
    }
    return unpacked.get(at);
  }

  // what is coloured: the numbers, how they become 0 to 1, and the ticks of the key
  function field() {
    const { key, unit } = state.measure;
    const pair = state.mode === grid.models.length ? [grid.models[0], grid.models.at(-1)] : null;
    if (pair) {
      const change = (a, b) => (key === "rank" ? Math.log10(a / b) : b - a);
      const values = pair[0][key].map((a, i) => change(a, pair[1][key][i]));
      const sizes = values.map(Math.abs).filter((size) => size > 0).sort();
      const end = sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] : 1;
      const told = key === "rank" ? (x) => `${say(x, true)} (log10)` : (x) => say(x, true) + unit;
      return { values, scale: (x) => 0.5 + 0.5 * Math.max(-1, Math.min(1, x / end)), ticks: [-end, 0, end], told, ramp: reading.ramp("diverging"), last: pair[1], first: pair[0] };
    }
    const values = grid.models[state.mode][key], ramp = reading.ramp("ramp"), last = grid.models[state.mode];
    const most = grid.models.reduce((most, model) => model[key].reduce((a, b) => (b > a ? b : a), most), 1e-6);
    const told = (x) => (key === "rank" ? x.toLocaleString("en-US") : say(x) + unit);
    if (key === "probability") return { values, ramp, last, told, scale: Math.sqrt, ticks: [0, 0.05, 0.25, 0.5, 1] };
    if (key === "rank") {
      const ticks = [1, 10, 100, 1000, 10000, 100000].filter((tick) => tick === 1 || tick <= most);
      return { values, ramp, last, told, scale: (x) => 1 - Math.log(x) / Math.log(Math.max(most, 2)), ticks: ticks.reverse() };
    }
    const scale = key === "kl" ? (x) => Math.sqrt(x / most) : (x) => x / most;
    return { values, ramp, last, told, scale, ticks: (key === "kl" ? [0, 1 / 16, 1 / 4, 1] : [0, 0.5, 1]).map((share) => share * most) };
  }
  const shade = (value) => (Number.isNaN(value) ? null : shown.ramp[Math.max(0, Math.min(255, Math.round(255 * shown.scale(value))))]);

  const strip = make("canvas", { className: "strip", "aria-hidden": "true" });
  const slider = make("input", { type: "range", min: 0, autocomplete: "off", "aria-label": "first position in view" });
  const cells = make("canvas", { className: "cells", tabIndex: 0, role: "application", "aria-roledescription": "lens grid", "aria-label": "Layer by position; arrow keys move from cell to cell" });
  const ticks = make("div", { className: "ticks" }), gradient = make("div", { className: "gradient" }), legend = make("div", { className: "legend" }, make("span"), make("div", {}, gradient, ticks));
  const where = make("p", { className: "where" });

  const rowOf = (line) => grid.rows.length - 1 - line; // the last layer is drawn on top
  const tokenAt = (model, row, column, rank = 0) => spelled[model.likeliest[(rank * grid.rows.length + row) * grid.n + column]];

  function layout() {
    const width = Math.max(280, cells.parentElement.clientWidth), count = Math.min(state.span, grid.n), left = 78;
    const step = (width - left - 12) / count, rows = grid.rows.length, tall = step < 40;
    const line = rows <= 16 ? 25 : rows <= 28 ? 20 : 15, above = tall ? 58 : 24, below = (tall ? 58 : 24) + 20;
    return { width, count, left, step, rows, tall, line, above, below, height: above + rows * line + below };
  }
  function fitted(context, text, room) {
    const trimmed = text.trim() || token(text);
    if (context.measureText(trimmed).width <= room) return trimmed;
    for (let length = trimmed.length - 1; length > 1; length -= 1) {
      const cut = `${trimmed.slice(0, length)}…`;
      if (context.measureText(cut).width <= room) return cut;
    }
    return "";
  }
  function write(context, text, column, y, up) {
    const x = box.left + (column + 0.5) * box.step;
    context.save();
    context.translate(x, y);
    context.textAlign = "center";
    if (box.tall) {
      context.rotate(-Math.PI / 2);
      context.textAlign = up ? "left" : "right";
    }
    if (!box.tall || box.step >= 9) context.fillText(fitted(context, text, box.tall ? 52 : box.step - 4), 0, box.tall ? 4 : 0);
    context.restore();
  }

  function draw() {
    box = layout();
    state.start = Math.max(0, Math.min(state.start, grid.n - box.count));
    const context = reading.sized(cells, box.width, box.height), [ink, soft, line, accent] = ["ink", "soft", "line", "accent"].map(reading.colour);
    const font = (size, weight = 400) => { context.font = `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`; };
    const difference = Boolean(shown.first);
    context.textBaseline = "alphabetic";
    for (let i = 0; i < box.rows; i += 1) {
      const row = rowOf(i), y = box.above + i * box.line;
      font(11);
      context.textAlign = "right";
      context.fillStyle = soft;
      context.fillText(grid.rows[row].slice(0, 12), box.left - 7, y + box.line / 2 + 4);
      font(Math.min(12, box.line - 4));
      context.textAlign = "center";
      for (let column = 0; column < box.count; column += 1) {
        const at = row * grid.n + state.start + column, rgb = shade(shown.values[at]), x = box.left + column * box.step;
        context.fillStyle = rgb ? `rgb(${rgb})` : "transparent";
        context.fillRect(x, y, box.step - 1, box.line - 1);
        if (box.step < 30 || !shown.last.tops) continue;
        const best = tokenAt(shown.last, row, state.start + column);
        // in the difference only what the models would say differently is written
        if (difference && best === tokenAt(shown.first, row, state.start + column)) continue;
        context.fillStyle = !rgb ? soft : reading.over(rgb);
        context.fillText(fitted(context, best, box.step - 7), x + (box.step - 1) / 2, y + box.line / 2 + 4);
      }
    }
    font(11.5);
    const foot = box.above + box.rows * box.line;
    for (let column = 0; column < box.count; column += 1) {
      const position = state.start + column;
      context.fillStyle = soft;
      if (grid.targets[position]) write(context, spelled[grid.targets[position]], column, box.above - 7, true);
      context.fillStyle = ink;
      write(context, spelled[grid.tokens[position]], column, foot + (box.tall ? 4 : 15), false);
      const every = Math.max(1, Math.ceil(34 / box.step));
      if (column % every === 0) {
        context.textAlign = "center";
        context.fillStyle = soft;
        context.fillText(grid.positions[position], box.left + (column + 0.5) * box.step, box.height - 5);
      }
      if (position && grid.segments[position] !== grid.segments[position - 1]) {
        context.fillStyle = accent;
        context.fillRect(box.left + column * box.step - 1.5, box.above - 6, 2, box.rows * box.line + 12);
      }
    }
    context.fillStyle = soft;
    context.textAlign = "right";
    context.fillText("next", box.left - 7, box.above - 7);
    context.fillText("token", box.left - 7, foot + 15);
    if (state.cursor) {
      const { row, position } = state.cursor, i = box.rows - 1 - row;
      if (position >= state.start && position < state.start + box.count) {
        context.strokeStyle = accent;
        context.lineWidth = 2;
        context.strokeRect(box.left + (position - state.start) * box.step, box.above + i * box.line, box.step - 1, box.line - 1);
      }
    }
    slider.value = state.start;
    const segments = [...new Set(grid.segments.slice(state.start, state.start + box.count))].map((segment) => spelled[segment]).filter(Boolean);
    where.textContent = `Positions ${grid.positions[state.start]} to ${grid.positions[state.start + box.count - 1]} of ${grid.n}${segments.length ? ` (${segments.join(", ")})` : ""}. Above: the token that comes next. Below: the token read.`;
    card.dataset.window = `${state.start} ${state.start + box.count}`;
    frame(line, accent);
  }

  // the whole grid, small, with a frame around the window
  let picture = null;
  function overview() {
    const rows = grid.rows.length;
    picture = make("canvas", { width: grid.n, height: rows });
    const context = picture.getContext("2d"), image = context.createImageData(grid.n, rows);
    for (let i = 0; i < rows; i += 1) {
      for (let position = 0; position < grid.n; position += 1) {
        const rgb = shade(shown.values[rowOf(i) * grid.n + position]);
        if (rgb) image.data.set([...rgb, 255], 4 * (i * grid.n + position));
      }
    }
    context.putImageData(image, 0, 0);
  }
  function frame(line, accent) {
    const height = 46, width = box.width - box.left - 12, context = reading.sized(strip, width, height), step = width / grid.n;
    context.imageSmoothingEnabled = grid.n > width;
    context.drawImage(picture, 0, 3, width, height - 6);
    context.strokeStyle = accent;
    context.lineWidth = 2;
    context.strokeRect(state.start * step + 1, 1, Math.max(3, box.count * step) - 2, height - 2);
  }

  // a summary's first token is predicted one position before it
  const opening = () => Math.max(0, grid.segments.indexOf(spelled.indexOf("summary")) - 1);
  function renew() {
    const before = grid;
    grid = opened(state.at);
    if (before?.text !== grid.text) state.start = opening();
    if (state.mode > grid.models.length) state.mode = 0;
    shown = field();
    overview();
    legend.firstChild.textContent = shown.first ? `${state.measure.label}, ${shown.last.name} − ${shown.first.name}${state.measure.key === "rank" ? " (tenfolds nearer to rank 1)" : ""}` : state.measure.label;
    gradient.style.background = `linear-gradient(to right, ${[0, 51, 102, 153, 204, 255].map((i) => `rgb(${shown.ramp[i]})`)})`;
    ticks.replaceChildren(...shown.ticks.map((tick) => {
      const sign = shown.first && tick > 0 ? "+" : "", text = Number(tick.toPrecision(2)).toLocaleString("en-US", { maximumFractionDigits: 6 });
      const mark = make("span", { textContent: sign + text.replace("-", "−") });
      mark.style.left = `${100 * shown.scale(tick)}%`;
      return mark;
    }));
    slider.max = Math.max(0, grid.n - Math.min(state.span, grid.n));
    draw();
  }

  function tell(row, position, x, y) {
    const at = row * grid.n + position, target = spelled[grid.targets[position]], lines = [];
    const cell = (text, tag = "td") => make(tag, { textContent: text });
    for (const { key, label, unit } of measures) {
      const numbers = grid.models.map((model) => model[key][at]);
      if (numbers.every(Number.isNaN)) continue;
      lines.push(make("tr", {}, cell(label, "th"), ...numbers.map((x) => cell(Number.isNaN(x) ? "–" : key === "rank" ? x.toLocaleString("en-US") : say(x) + unit))));
    }
    for (let rank = 0; rank < Math.max(...grid.models.map((model) => model.tops)); rank += 1) {
      const tops = grid.models.map((model) => {
        const share = model.shares[(rank * grid.rows.length + row) * grid.n + position], text = tokenAt(model, row, position, rank);
        const bar = make("i", {}), place = make("td", {}, make("b", { textContent: token(text), className: grid.targets[position] && text === target ? "hit" : "" }), ` ${say(share)}`, bar);
        bar.style.width = `${Math.round(100 * (share || 0))}%`;
        return place;
      });
      lines.push(make("tr", { className: "top" }, cell(rank ? "" : `top ${top}`, "th"), ...tops));
    }
    const heading = make("p", {}, make("strong", { textContent: token(spelled[grid.tokens[position]]) }), target ? ` → ${token(target)}` : "", make("small", { textContent: `position ${grid.positions[position]}, ${grid.rows[row]}, ${grid.lens_name}` }));
    const head = grid.models.length > 1 ? [make("tr", {}, cell("", "th"), ...grid.models.map((model) => cell(model.name, "th")))] : [];
    reading.hint(x, y, heading, make("table", {}, ...head, ...lines));
  }
  function point(event) {
    const area = cells.getBoundingClientRect(), column = Math.floor((event.clientX - area.left - box.left) / box.step);
    const i = Math.floor((event.clientY - area.top - box.above) / box.line);
    if (column < 0 || column >= box.count || i < 0 || i >= box.rows) return reading.unhint();
    if (event.type === "pointerdown") {
      state.cursor = { row: rowOf(i), position: state.start + column };
      draw();
    }
    return tell(rowOf(i), state.start + column, event.clientX, event.clientY);
  }
  function key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0], PageUp: [0, -box.count], PageDown: [0, box.count], Home: [0, -grid.n], End: [0, grid.n] };
    if (event.key === "Escape") return reading.unhint();
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return undefined;
    event.preventDefault();
    const [up, right] = moves[event.key], from = state.cursor ?? { row: box.rows - 1, position: state.start };
    const clip = (x, most) => Math.max(0, Math.min(most, x));
    state.cursor = { row: clip(from.row + up, box.rows - 1), position: clip(from.position + right, grid.n - 1) };
    const { row, position } = state.cursor;
    if (position < state.start) state.start = position;
    if (position >= state.start + box.count) state.start = position - box.count + 1;
    draw();
    const area = cells.getBoundingClientRect(), told = shown.values[row * grid.n + position];
    tell(row, position, area.left + box.left + (position - state.start + 1) * box.step, area.top + box.above + (box.rows - row) * box.line);
    reading.live.textContent = `${grid.rows[row]}, position ${grid.positions[position]}, ${spelled[grid.tokens[position]]}: ${shown.last.tops ? tokenAt(shown.last, row, position) : ""}, ${state.measure.label} ${Number.isNaN(told) ? "none" : shown.told(told)}`;
    return undefined;
  }

  const several = (values) => new Set(values).size > 1;
  const modes = [...grids[0].models.map((model) => model.name), ...(grids[0].models.length > 1 ? ["difference"] : [])];
  const many = several(grids.map((each) => each.lens));
  const controls = make("div", { className: "reading-controls" });
  if (grids.length > 1) {
    controls.append(reading.select(many ? "Text and lens" : "Text", grids.map((each) => (many ? `${each.text}, ${each.lens_name}` : each.text)), (at) => { Object.assign(state, { at, cursor: null }); renew(); }));
  }
  if (modes.length > 1) controls.append(reading.radios("Model", `lens-model-${number}`, modes, (mode) => { state.mode = mode; renew(); }));
  controls.append(reading.select("Colour", measures.map((measure) => measure.label), (i) => { state.measure = measures[i]; renew(); }));
  controls.append(reading.select("Positions in view", spans.map(String), (i) => { state.span = spans[i]; renew(); }));
  card.querySelector(".stage").append(controls, legend, strip, slider, cells, where);
  for (const kind of ["pointermove", "pointerdown"]) cells.addEventListener(kind, point);
  cells.addEventListener("pointerleave", reading.unhint);
  cells.addEventListener("blur", reading.unhint);
  cells.addEventListener("keydown", key);
  cells.addEventListener("wheel", (event) => {
    if (Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
    event.preventDefault();
    state.start += Math.sign(event.deltaX) * Math.max(1, Math.round(Math.abs(event.deltaX) / box.step));
    draw();
  }, { passive: false });
  slider.addEventListener("input", () => { state.start = slider.valueAsNumber; draw(); });
  const drag = (event) => {
    if (!event.buttons) return;
    state.start = Math.round(((event.offsetX / strip.clientWidth) * grid.n) - box.count / 2);
    draw();
  };
  strip.addEventListener("pointerdown", drag);
  strip.addEventListener("pointermove", drag);
  reading.night.addEventListener("change", renew);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    draw();
  }).observe(card.querySelector(".stage"));
  renew();
  document.documentElement.dataset.lens = "drawn";
});
