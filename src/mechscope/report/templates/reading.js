// what the lens grid and the token view share: a panel's data, unpacking numbers, colours of the scheme, controls, the hint beside the pointer
const reading = (() => {
  const night = window.matchMedia("(prefers-color-scheme: dark)"), { light, dark } = JSON.parse(document.getElementById("charts").textContent);
  const missing = 65535;

  // draw every panel of a kind, of which there may be none; its data stand in the same order as its elements
  function each(kind, selector, draw) {
    document.querySelectorAll(selector).forEach((card, at) => draw(card, JSON.parse(document.getElementById(`${kind}-data`).textContent)[at], at));
  }

  function buffer(text) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
    return bytes.buffer;
  }
  const whole = ({ bytes, data: text }) => new { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[bytes](buffer(text));
  // the code of `packed.py`
  function measured({ max, data: text }, power) {
    return Float32Array.from(new Uint16Array(buffer(text)), (code) => (code === missing ? NaN : max * (code / (missing - 1)) ** power));
  }

  // as `theme.number` writes them
  function say(x, sign = false) {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    const size = Math.abs(x);
    const text = size && size < 1e-4 ? x.toExponential(2) : x.toFixed(Math.max(0, 2 - (size ? Math.floor(Math.log10(size)) : 0)));
    return `${sign && x >= 0 ? "+" : ""}${text}`.replaceAll("-", "−");
  }

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) name in element ? (element[name] = value) : element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  function select(heading, options, change) {
    const box = make("select", { autocomplete: "off" }, ...options.map((text, i) => make("option", { value: i, textContent: text })));
    box.addEventListener("change", () => change(Number(box.value)));
    return make("label", { className: "pick" }, make("span", { textContent: heading }), box);
  }
  function radios(heading, name, options, change) {
    const labels = options.map((text, i) => {
      const input = make("input", { type: "radio", name, value: i, checked: i === 0, autocomplete: "off" });
      input.addEventListener("change", () => change(i));
      return make("label", {}, input, make("span", { textContent: text }));
    });
    return make("fieldset", { className: "which" }, make("legend", { textContent: heading }), ...labels);
  }

  const tip = make("div", { className: "reading-tip", hidden: true });
  const live = make("div", { className: "unseen", "aria-live": "polite" });
  document.body.append(tip, live);
  function hint(x, y, ...children) {
    tip.replaceChildren(...children);
    tip.hidden = false;
    const left = x + 16 + tip.offsetWidth < window.innerWidth ? x + 16 : x - tip.offsetWidth - 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 12, window.innerHeight - tip.offsetHeight - 6))}px`;
  }
  const unhint = () => { tip.hidden = true; };

  // 256 colours from the stops of the scheme that is on
  function ramp(name) {
    const stops = (night.matches ? dark : light).range[name].map(channels);
    return Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1), below = Math.min(stops.length - 2, Math.floor(at));
      return stops[below].map((part, k) => Math.round(part + (at - below) * (stops[below + 1][k] - part)));
    });
  }
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  // black or white, whichever is easier to read over a colour: one of them has a contrast of 4.58 or more (WCAG 2.2's relative luminance)
  function over(behind) {
    const [red, green, blue] = behind.map((part) => (part <= 10 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff";
  }
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  // the canvas in the pixels of the screen, with a context that counts in those of the page
  function sized(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  const token = (text) => (text === "" ? "∅" : text.replaceAll(" ", "␣"));
  return { each, night, whole, measured, say, make, select, radios, hint, unhint, live, ramp, channels, over, colour, sized, token };
})();
