"""A headless Chromium, driven by playwright, and what is asked of a page in it: axe-core's rules, widths, overlaps, contrast in charts, signs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from playwright.sync_api import Page as Opened
from playwright.sync_api import sync_playwright

from tests.report.test_page import CHROMIUM

# charts are one picture each for a screen reader, with their own checks here; the rows of a table are alike, as far as rules go
_FOR_AXE = "svg.marks > *, svg.circuit > *, tbody tr:nth-child(n+3) { display: none !important; }"

# elements that stick out of the screen and cannot be scrolled to
WIDE = """() => {
  const width = document.documentElement.clientWidth, said = (e) => `${e.tagName} ${e.className.baseVal ?? e.className} ${e.textContent.trim().slice(0, 40)}`;
  const boxed = (e) => {
    for (let at = e.parentElement; at && at !== document.body; at = at.parentElement) if (getComputedStyle(at).overflowX !== "visible") return true;
    return false;
  };
  return [...document.body.querySelectorAll("*")].filter((e) => {
    const { left, right, width: own, height } = e.getBoundingClientRect();
    return own && height && right > 0 && (right > width + 1 || left < -1) && !boxed(e);
  }).map(said);
}"""

# boxes with more in them than they show, that no key can scroll: neither they nor anything inside can be focused, or they have no name
STUCK = """() => [...document.body.querySelectorAll("*")].filter((e) => {
  const { overflowX, overflowY, position } = getComputedStyle(e);
  const more = (/auto|scroll/.test(overflowX) && e.scrollWidth > e.clientWidth + 1) || (/auto|scroll/.test(overflowY) && e.scrollHeight > e.clientHeight + 1);
  if (!more || !e.clientWidth || position === "fixed") return false;
  return !(e.tabIndex >= 0 && e.hasAttribute("aria-label")) && !e.querySelector("a, button, input, select, summary, [tabindex]");
}).map((e) => `${e.tagName} ${e.className}`)"""

# texts of charts that meet one another or are cut off, and texts that are hard to read over what is drawn behind them
CHARTS = """() => {
  const met = [], faint = [];
  const corners = (e) => {
    const m = e.getScreenCTM(), { x, y, width, height } = e.getBBox();
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]].map(([u, v]) => [m.a * u + m.c * v + m.e, m.b * u + m.d * v + m.f]);
  };
  // how far two turned rectangles reach into one another (separating axes)
  const depth = (one, two) => Math.min(...[one, two].flatMap((box) => [0, 1].map((i) => {
    const dx = box[i + 1][0] - box[i][0], dy = box[i + 1][1] - box[i][1], length = Math.hypot(dx, dy) || 1;
    const [a, b] = [one, two].map((points) => points.map(([u, v]) => (u * dx + v * dy) / length));
    return Math.min(Math.max(...a), Math.max(...b)) - Math.max(Math.min(...a), Math.min(...b));
  })));
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const seen = new Map();
  const channels = (colour) => {
    if (!seen.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      seen.set(colour, [...canvas.getImageData(0, 0, 1, 1).data]);
    }
    return seen.get(colour);
  };
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = (colour) => channels(colour).slice(0, 3).map(linear).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => { const [low, high] = [light(a), light(b)].sort((x, y) => x - y); return (high + 0.05) / (low + 0.05); };
  for (const svg of document.querySelectorAll("main svg.marks, main svg.circuit, main svg.curve")) {
    const frame = svg.getBoundingClientRect(), name = svg.closest("[data-figure]")?.dataset.figure ?? svg.getAttribute("class");
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll("text")]
      .filter((e) => e.textContent.trim() && e.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
      .map((e) => ({ e, words: e.textContent.trim(), box: e.getBoundingClientRect(), turned: corners(e) }))
      .filter(({ box }) => box.width).sort((a, b) => a.box.left - b.box.left);
    const painted = [...svg.querySelectorAll("path, rect, circle")].map((e) => ({ e, style: getComputedStyle(e), box: e.getBoundingClientRect() }))
      .filter(({ style, box }) => box.width && /^rgb/.test(style.fill) && channels(style.fill)[3] > 127 && style.fillOpacity * style.opacity > 0.5);
    const ground = getComputedStyle(svg.closest(".chart-card")).backgroundColor;
    texts.forEach(({ e, words, box, turned }, i) => {
      if (Math.max(frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom) > 1.5) met.push([name, "cut off", words]);
      for (const other of texts.slice(i + 1)) {
        if (other.box.left > box.right) break;
        if (depth(turned, other.turned) > 2.5) met.push([name, words, other.words]);
      }
      const x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
      const under = ({ e: shape, box: b }) => b.left <= x && x <= b.right && b.top <= y && y <= b.bottom
        && shape.compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING;
      const behind = painted.filter(under).at(-1);
      const ratio = contrast(getComputedStyle(e).fill, behind?.style.fill ?? ground);
      if (ratio < 4.5) faint.push([name, words, Number(ratio.toFixed(2)), getComputedStyle(e).fill, behind?.style.fill ?? ground]);
    });
  }
  return { met, faint };
}"""

# shown text with a hyphen for a minus, or a per-cent sign that is not behind a narrow space; code, settings and paths keep theirs
SIGNS = """() => {
  const wrong = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest("script, style, noscript, pre, code, .record, .sample, .flow")) continue;
    for (const [found] of node.textContent.matchAll(/.{0,30}((?<![\\p{L}\\p{N}_)\\]])-\\.?\\d|\\de-\\d|\\d ?%).{0,20}/gu)) wrong.push(found);
  }
  return wrong;
}"""

# charts that a screen reader cannot name and describe
UNNAMED = """() => [...document.querySelectorAll("[data-figure]")]
  .filter((place) => !place.querySelector("svg[role=img][aria-label][aria-describedby]")).map((place) => place.dataset.figure)"""

# cells of columns of numbers that are not set to the right in figures of equal width
RAGGED = """() => [...document.querySelectorAll(".scroll .n")].filter((cell) => {
  const { textAlign, fontVariantNumeric } = getComputedStyle(cell);
  return textAlign !== "right" || fontVariantNumeric !== "tabular-nums";
}).map((cell) => cell.textContent)"""


@contextmanager
def browser() -> Iterator[Any]:
    """Start a browser whose pages take injected scripts although their own policy forbids them."""
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM)
        try:
            yield chromium.new_context(bypass_csp=True, reduced_motion="reduce")
        finally:
            chromium.close()


def opened(context: Any, file: Path, complaints: list[str], *, width: int = 1400) -> Opened:
    """Open a page, unfold what is folded, and wait until it is drawn; what the browser complains of is added to `complaints`."""
    page: Opened = context.new_page()
    page.set_default_timeout(240_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(file.as_uri())
    page.evaluate("for (const each of document.querySelectorAll('main details')) if (!each.closest('.chart')) each.open = true")
    page.add_script_tag(content=(resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    _drawn(page)
    return page


def turned(page: Opened, *, width: int, scheme: Any) -> None:
    """Give the page another width and colour scheme, and wait until it is drawn again."""
    # the page hears of another scheme in its own time; until then it would say that it is drawn
    change = (
        "(dark) => { if (matchMedia('(prefers-color-scheme: dark)').matches !== dark) delete document.documentElement.dataset.charts; }"
    )
    page.evaluate(change, scheme == "dark")
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    _drawn(page)


def _drawn(page: Opened) -> None:
    # a chart whose place has changed is looked at a moment later (report.js)
    page.wait_for_timeout(400)
    page.wait_for_function("document.documentElement.dataset.charts === 'drawn'")


def violations(page: Opened, *, contrast: bool = True) -> list[tuple[str, str, str]]:
    """Return what axe-core objects to, by all its rules or all but the one of contrast (by far the slowest): rule, element, reason."""
    return page.evaluate(
        """async ([style, contrast]) => {
          const sheet = document.head.appendChild(Object.assign(document.createElement("style"), { textContent: style }));
          const { violations } = await axe.run({ resultTypes: ["violations"], rules: { "color-contrast": { enabled: contrast } } });
          sheet.remove();
          return violations.flatMap(({ id, nodes }) => nodes.map((node) => [id, node.target.join(" "), node.failureSummary]));
        }""",
        [_FOR_AXE, contrast],
    )
