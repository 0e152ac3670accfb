// Draws the figures of `distclip report` with uPlot. Every name is set as text, never as HTML.
(() => {
  "use strict";

  const CLIPPED = 1, SKIPPED = 2, NOT_FINITE = 4;   // bits of a run's flags
  const BAD_SHARE = 255, WHOLE_SHARE = 254;         // codes of a heat map's cells
  const NUM_COLOURS = 8;                            // --s0 … --s7 in page.css
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
  const THRESHOLD_DASH = [4, 4];
  const NEAR_PX = 10, FEW_POINTS = 60, DENSE_POINTS = 300, PRINTED_PX = 680, LABEL_PX = 18, SMALLEST_WINDOW = 4;
  const FAINT = 0.5;                                // curves below running medians
  const MOST_OTHERS = 6;                            // runs named below the one that is pointed at
  const NARROW_PX = 560;
  const HEAT_COLOURS = [                            // dark blue to yellow, lightness even
    [38, 18, 84], [60, 40, 130], [59, 82, 139], [44, 113, 142], [33, 144, 141],
    [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
  ];

  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);

  // ---------------------------------------------------------------- numbers

  function bytesOf(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }

  function column(packed, length) {
    if (packed === null || packed === undefined) return new Float64Array(length).fill(NaN);
    if (typeof packed === "number") return new Float64Array(length).fill(packed);
    if (packed.u1 !== undefined) return bytesOf(packed.u1);
    return packed.f4 !== undefined
      ? new Float32Array(bytesOf(packed.f4).buffer)
      : new Float64Array(bytesOf(packed.f8).buffer);
  }

  const runs = data.runs.map((run, i) => ({
    name: run.name, index: i, on: true, clamps: run.clamps, boundsNorm: run.boundsNorm,
    p: run.p, parts: run.parts, kept: run.kept, steps: run.steps,
    colour: `--s${i % NUM_COLOURS}`, dash: DASHES[Math.floor(i / NUM_COLOURS) % DASHES.length],
    step: column(run.step, run.kept), norm: column(run.norm, run.kept),
    median: column(run.median, run.kept),
    threshold: column(run.threshold, run.kept), coef: column(run.coef, run.kept),
    rate: column(run.rate, run.kept), flags: column(run.flags, run.kept),
    top: column(run.top, run.kept), share: column(run.share, run.kept),
    cosine: run.cosine === undefined ? null : column(run.cosine, run.kept),
  }));
  const heats = data.heats.map((heat) => ({
    ...heat, mode: "byLargest", first: column(heat.first, 1), last: column(heat.last, 1),
    shares: column(heat.shares, 1),
  }));

  function significant(value, digits = 5) {
    if (!Number.isFinite(value)) return "not finite";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) {
      return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    return String(Number(value.toPrecision(digits)));
  }
  const whole = (value) => Math.round(value).toLocaleString("en-US");
  function percent(share) {
    if (share > 0 && share < 0.001) return "under 0.1\u00a0%";
    if (share > 0.999 && share < 1) return "over 99.9\u00a0%";
    const whole_ = (share >= 0.0995 && share <= 0.99) || share === 0 || share === 1;
    return `${(100 * share).toFixed(whole_ ? 0 : 1)}\u00a0%`;
  }

  // first position whose step is at least `step`
  function search(steps, step) {
    let low = 0, high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low;
  }

  function nearest(steps, step) {
    const after = Math.min(search(steps, step), steps.length - 1);
    const before = Math.max(after - 1, 0);
    return step - steps[before] < steps[after] - step ? before : after;
  }

  // ---------------------------------------------------------------- state

  const ends = [Infinity, -Infinity];
  for (const run of runs) {
    ends[0] = Math.min(ends[0], run.step[0]);
    ends[1] = Math.max(ends[1], run.step[run.kept - 1]);
  }
  if (ends[0] === ends[1]) { ends[0] -= 1; ends[1] += 1; }
  const state = { low: ends[0], high: ends[1], pick: null, front: null };

  const title = runs.every((run) => run.p === runs[0].p)
    ? `Gradient norm before clipping (p = ${runs[0].p})` : "Gradient norm before clipping";
  const figures = [
    {
      id: "norm", title, label: "norm", scale: "log", scales: ["log", "linear"], tall: 1.25,
      of: (run) => run.norm, bounds: true,
      caption: "Thick: the running median of 101 steps. Dashes: the threshold, where it is one of "
        + "this norm. × at the top: a norm that is not finite. × on a curve: a skipped step.",
    },
    {
      id: "coefficient", title: "Clip coefficient", label: "coefficient", scale: "log",
      scales: ["log", "linear"], of: (run) => run.coef,
      caption: "What the gradients were multiplied by; of several groups the smallest. 1: not "
        + "clipped, 0: skipped.",
    },
    {
      id: "clip_rate", title: "Clip rate", label: "clipped steps (%)", scale: "linear", scales: [],
      of: (run) => run.rate, factor: 100, range: [-2, 102],
      caption: "Share of the last 500 steps (from the start: of all so far) that were clipped.",
    },
  ];
  if (runs.some((run) => run.cosine)) {
    figures.push({
      id: "cosine", title: "Cosine between raw and clipped gradient", label: "cosine",
      scale: "linear", scales: [], of: (run) => run.cosine || run.coef.map(() => NaN),
      range: [-0.02, 1.02],
      caption: "How far value clipping bends the direction; of several groups the smallest. 1: "
        + "not at all.",
    });
  }
  heats.forEach((heat, i) => {
    const count = heats.filter((one) => one.run === heat.run).length;
    figures.push({
      id: `${heat.kind}s-${heat.run + 1}`, heat, scales: [],
      title: `${runs[heat.run].name}: which ${heat.kind} dominates`, number: i, count,
    });
  });

  // ---------------------------------------------------------------- elements

  function element(tag, attributes = {}, ...children) {
    const out = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") out.textContent = value;
      else if (name === "class") out.className = value;
      else if (name.startsWith("on")) out.addEventListener(name.slice(2), value);
      else out.setAttribute(name, value);
    }
    out.append(...children);
    return out;
  }

  function button(text, label, action) {
    return element("button", { type: "button", text, "aria-label": label, title: label, onclick: action });
  }

  const home = document.getElementById("figures");
  const from = element("input", { type: "number", id: "from", inputmode: "numeric", step: "any" });
  const to = element("input", { type: "number", id: "to", inputmode: "numeric", step: "any" });
  for (const input of [from, to]) {
    input.addEventListener("change", () => {
      const low = Number(from.value), high = Number(to.value);
      if (from.value !== "" && to.value !== "" && low < high) setRange(low, high);
      else showRange();
    });
  }
  const toolbar = element(
    "div", { class: "toolbar", role: "toolbar", "aria-label": "Steps shown in all figures" },
    button("−", "zoom out", () => zoom(2)), button("+", "zoom in", () => zoom(0.5)),
    button("←", "earlier steps", () => pan(-0.5)), button("→", "later steps", () => pan(0.5)),
    button("All steps", "show all steps", showAll),
    element("span", { class: "window" }, element("label", { for: "from", text: "steps" }), from,
      element("label", { for: "to", text: "to" }), to),
  );
  const help = element("p", {
    class: "muted help",
    text: "Drag: zoom. Shift and drag, or shift and wheel: move. Ctrl and wheel: zoom. Double click: all "
      + "steps. Keys on a figure: ← → next point, ↑ ↓ other run, Shift ← → move, + − zoom, 0 all steps.",
  });
  const list = element("ul", { class: "runs" });
  const boxes = runs.map((run, i) => {
    const box = element("input", { type: "checkbox", id: `run-${i}`, onchange: () => {
      run.on = box.checked;
      rebuild();
    } });
    box.checked = true;
    const swatch = element("canvas", { class: "swatch", width: "60", height: "20", "aria-hidden": "true" });
    const front = (to) => () => { if (state.front !== to) { state.front = to; fade(); } };
    const item = element(
      "li", { onmouseenter: front(i), onmouseleave: front(null) },
      element("label", { for: `run-${i}` }, box, swatch,
        element("span", { text: runs.length > NUM_COLOURS ? `${i + 1} · ${run.name}` : run.name })),
    );
    box.addEventListener("focus", front(i));
    box.addEventListener("blur", front(null));
    list.append(item);
    return { box, swatch };
  });
  function showRuns(which) {
    runs.forEach((run, i) => { run.on = boxes[i].box.checked = which(i); });
    rebuild();
  }
  const choice = element("fieldset", {}, element("legend", { text: "Runs" }), list);
  if (runs.length > 1) {
    choice.append(button("all", "show all runs", () => showRuns(() => true)),
      button("none", "show no run", () => showRuns(() => false)));
  }
  home.append(choice, toolbar, help);
  const tip = element("div", { id: "tip", role: "status" });
  tip.hidden = true;
  document.body.append(tip);

  for (const figure of figures) {
    const heading = element("h2", { text: figure.title });
    figure.box = element("div", {
      class: "plot", id: `plot-${figure.id}`, tabindex: "0", role: "group",
      "aria-label": `${figure.title}. Arrow keys go from point to point.`,
    });
    figure.caption_ = element("figcaption", { text: figure.caption || "" });
    const head = element("div", { class: "head" }, heading);
    if (figure.scales.length) head.append(chooser("axis", figure.scales, figure.scale, (value) => {
      figure.scale = value;
      rebuild();
    }, `Axis of ${figure.title}`));
    if (figure.heat && figure.heat.byMean.length < figure.heat.total) {
      head.append(chooser("rows by", ["maximum", "mean"], "maximum", (value) => {
        figure.heat.mode = value === "mean" ? "byMean" : "byLargest";
        rebuild();
      }, `Rows of ${figure.title}`));
    }
    home.append(element("figure", { id: figure.id }, head, figure.box, figure.caption_));
    figure.box.addEventListener("keydown", (event) => keyPressed(figure, event));
    figure.box.addEventListener("focus", () => { state.pick || firstPick(); placePick(figure); });
    figure.box.addEventListener("blur", hideTip);
  }

  function chooser(text, values, chosen, action, label) {
    const select = element("select", { "aria-label": label, onchange: () => action(select.value) });
    for (const value of values) {
      const option = element("option", { value, text: value });
      option.selected = value === chosen;
      select.append(option);
    }
    return element("label", { class: "chooser", text: `${text} ` }, select);
  }

  // ---------------------------------------------------------------- what is drawn

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const isNarrow = (width) => width < NARROW_PX;

  // The points of one run inside the window: all, or the lowest and the highest of each pixel.
  function drawnPoints(run, figure, pixels) {
    const values = figure.of(run), factor = figure.factor || 1, log = figure.scale === "log";
    const start = Math.max(search(run.step, state.low) - 1, 0);
    const end = Math.min(search(run.step, state.high + 1e-9) + 1, run.kept);
    const out = { x: [], y: [], bound: [], median: [], at: [] };
    const put = (at) => {
      const value = values[at] * factor, lost = (run.flags[at] & NOT_FINITE) !== 0;
      if (Number.isNaN(value) && !lost) return;      // only this number is missing: draw across
      out.x.push(run.step[at]);
      out.y.push(lost || !Number.isFinite(value) || (log && value <= 0) ? null : value);
      if (figure.bounds) {
        out.bound.push(run.threshold[at] > 0 ? run.threshold[at] : undefined);
        out.median.push(run.median[at] > 0 ? run.median[at] : undefined);
      }
      out.at.push(at);
    };
    if (end - start <= 2 * pixels) {
      for (let at = start; at < end; at++) put(at);
      return out;
    }
    const scale = pixels / (state.high - state.low);
    for (let at = start; at < end;) {
      const pixel = Math.floor((run.step[at] - state.low) * scale);
      let low = -1, high = -1, lost = -1, next = at;
      for (; next < end && Math.floor((run.step[next] - state.low) * scale) === pixel; next++) {
        const value = values[next];
        if (lost < 0 && run.flags[next] & NOT_FINITE) lost = next;
        if (!Number.isFinite(value) || (log && value <= 0)) continue;
        if (low < 0 || value < values[low]) low = next;
        if (high < 0 || value > values[high]) high = next;
      }
      const kept = [...new Set([low, high, lost])].filter((one) => one >= 0).sort((a, b) => a - b);
      (kept.length ? kept : [at]).forEach(put);
      at = next;
    }
    return out;
  }

  function curveData(figure, pixels) {
    figure.drawn = runs.map((run) => (run.on ? drawnPoints(run, figure, pixels) : null));
    const tables = layers(figure).map(({ run, kind }) => {
      const points = figure.drawn[run.index];
      return [points.x, points[kind]];
    });
    return tables.length ? uPlot.join(tables) : [[state.low, state.high]];
  }

  // What is drawn of which run, from below to the top: curves, running medians, thresholds.
  function layers(figure) {
    const on = runs.filter((run) => run.on), out = on.map((run) => ({ run, kind: "y" }));
    if (!figure.bounds) return out;
    return [...out, ...on.map((run) => ({ run, kind: "median" })),
      ...on.filter((run) => run.boundsNorm).map((run) => ({ run, kind: "bound" }))];
  }

  function curveSeries(figure) {
    const several = figure.bounds && runs.filter((run) => run.on).length > 1;
    return [{}, ...layers(figure).map(({ run, kind }) => {
      const stroke = css(run.colour), base = { stroke, run: run.index, kind, points: { show: false } };
      if (kind === "median") return { ...base, dash: run.dash, width: 2 };
      if (kind === "bound") {
        return { ...base, dash: THRESHOLD_DASH, width: 1.5, paths: uPlot.paths.stepped({ align: 1 }) };
      }
      const few = figure.drawn[run.index].x.length < FEW_POINTS;
      return { ...base, dash: several ? [] : run.dash, width: several ? 1 : 1.4, alpha: several && isDense(figure.drawn[run.index]) ? FAINT : 1,
        points: { show: few, size: 5, fill: stroke } };
    })];
  }

  function logTicks(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const every = Math.max(1, Math.ceil((last - first) / 7));
    const parts = last - first > 3 ? [1] : [1, 2, 5];
    const out = [];
    for (let power = first; power <= last; power++) {
      if (((power % every) + every) % every) continue;
      for (const part of parts) {
        const tick = Number(`${part}e${power}`);
        if (tick >= low && tick <= high) out.push(tick);
      }
    }
    return out;
  }

  function yRange(figure) {
    if (figure.range) return () => figure.range;
    return (_, low, high) => {
      if (low === null || low === undefined || high === null) return figure.scale === "log" ? [0.1, 10] : [0, 1];
      if (figure.scale === "log") {
        const wide = high < 3 * low ? 1.8 : 1.25;
        return [low / wide, high * wide];
      }
      const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
    };
  }

  const stepTicks = [];
  for (let power = 0; power < 16; power++) for (const part of [1, 2, 5]) stepTicks.push(part * 10 ** power);

  function axes(figure, gutter) {
    const ink = css("--ink"), grid = css("--grid"), font = "12px system-ui, sans-serif";
    const base = { stroke: ink, font, labelFont: font, grid: { stroke: grid, width: 1 },
      ticks: { stroke: grid, width: 1, size: 5 } };
    const x = { ...base, incrs: stepTicks, size: 42, label: "step", labelSize: LABEL_PX, space: 70,
      values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : whole(tick))) };
    if (figure.heat) {
      const rows = figure.heat[figure.heat.mode];
      const most = Math.max(6, Math.floor((gutter - 12) / 6.6));
      return [x, { ...base, size: gutter, grid: { show: false }, ticks: { show: false },
        splits: () => rows.map((_, i) => rows.length - i - 0.5),
        values: () => rows.map((row) => shortened(figure.heat.labels[row], most)) }];
    }
    const y = { ...base, size: gutter - LABEL_PX, label: figure.label, labelSize: LABEL_PX,
      values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : significant(tick, 4))) };
    if (figure.scale === "log") {
      y.splits = (_, __, low, high) => logTicks(low, high);
      y.filter = (_, ticks) => ticks;
    }
    return [x, y];
  }

  const shortened = (text, most) => (text.length <= most ? text
    : `${text.slice(0, Math.ceil(most / 2) - 1)}…${text.slice(-Math.floor(most / 2))}`);

  function gutterFor(width) {
    if (!heats.length) return isNarrow(width) ? 74 : 88;
    const longest = Math.max(...heats.flatMap((heat) => heat.labels.map((label) => label.length)));
    return Math.max(82, Math.min(isNarrow(width) ? 96 : 170, 12 + 6.8 * longest));
  }

  function heightOf(figure, width) {
    if (figure.heat) return 66 + figure.heat[figure.heat.mode].length * (isNarrow(width) ? 15 : 18);
    return Math.round((isNarrow(width) ? 210 : 250) * (figure.tall || 1));
  }

  function build(figure) {
    const width = root.dataset.print ? PRINTED_PX : Math.floor(figure.box.clientWidth);
    if (!width) return;
    const gutter = gutterFor(width);
    if (figure.plot) figure.plot.destroy();
    figure.pixels = Math.max(100, width - gutter);
    const drawn = figure.heat ? [[state.low, state.high], [null, null]] : curveData(figure, figure.pixels);
    const rows = figure.heat && figure.heat[figure.heat.mode].length;
    figure.plot = new uPlot({
      width, height: heightOf(figure, width),
      pxAlign: 0, legend: { show: false }, padding: [8, 26, 0, 0],
      scales: {
        x: { time: false, range: () => [state.low, state.high] },
        y: figure.heat ? { range: () => [0, rows] }
          : { distr: figure.scale === "log" ? 3 : 1, range: yRange(figure) },
      },
      series: figure.heat ? [{}, { show: true, points: { show: false } }] : curveSeries(figure),
      axes: axes(figure, gutter),
      cursor: {
        x: false, y: false, points: { show: false },
        drag: { x: true, y: false, setScale: false },
        bind: {
          mousedown: (u, _, handler) => (event) => {
            if (event.shiftKey || event.button === 1) startPan(u, event); else handler(event);
          },
          dblclick: () => () => { showAll(); },
        },
      },
      hooks: {
        setSelect: [(u) => {
          const { left, width: span } = u.select;
          if (span < 4) return;
          const low = u.posToVal(left, "x"), high = u.posToVal(left + span, "x");
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          setRange(low, high);
        }],
        drawAxes: figure.heat ? [(u) => drawHeat(u, figure)] : [],
        draw: figure.heat ? [] : [(u) => drawMarks(u, figure)],
      },
    }, drawn, figure.box);
    figure.cross = element("div", { class: "cross" });
    figure.dot = element("div", { class: "dot" });
    const over = figure.plot.over;
    over.append(figure.cross, figure.dot);
    over.addEventListener("mousemove", (event) => pointedAt(figure, event));
    over.addEventListener("mouseleave", hideTip);
    over.addEventListener("wheel", (event) => wheelTurned(figure.plot, event), { passive: false });
    watchTouch(figure, over);
    captionOfHeat(figure);
    placeCross(figure);
  }

  function rebuild() {
    hideTip();
    for (const figure of figures) build(figure);
    boxes.forEach(({ swatch }, i) => drawSwatch(swatch, runs[i]));
    fade();
    showRange();
  }

  function refresh() {
    for (const figure of figures) {
      const { plot } = figure;
      if (!plot) continue;
      plot.batch(() => {
        plot.setData(figure.heat ? [[state.low, state.high], [null, null]]
          : curveData(figure, figure.pixels), false);
        plot.setScale("x", { min: state.low, max: state.high });
      });
      placeCross(figure);
    }
    fade();
    showRange();
  }

  const isDense = (points) => points && points.x.length > DENSE_POINTS;

  function fade() {
    for (const { plot, heat, drawn } of figures) {
      if (!plot || heat) continue;
      for (const series of plot.series.slice(1)) {
        const usual = series.kind === "y" && series.width === 1 && isDense(drawn[series.run]) ? FAINT : 1;
        series.alpha = state.front === null ? usual : series.run === state.front ? 1 : 0.12;
      }
      plot.redraw(false);
    }
  }

  function drawSwatch(canvas, run) {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.strokeStyle = css(run.colour);
    context.lineWidth = 5;
    context.setLineDash(run.dash.map((length) => 2 * length));
    context.beginPath();
    context.moveTo(2, 10);
    context.lineTo(58, 10);
    context.stroke();
  }

  function drawMarks(u, figure) {
    const { ctx } = u, size = 3.5 * devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top - 8, u.bbox.width, u.bbox.height + 8);
    ctx.clip();
    ctx.lineWidth = 1.6 * devicePixelRatio;
    ctx.setLineDash([]);                             // uPlot leaves that of its last series
    for (const run of runs) {
      if (!run.on || figure.id !== "norm") continue;
      ctx.strokeStyle = css(run.colour);
      let last = -Infinity;
      const end = search(run.step, state.high + 1e-9);
      for (let at = search(run.step, state.low); at < end; at++) {
        const lost = run.flags[at] & NOT_FINITE;
        if (!lost && !(run.flags[at] & SKIPPED)) continue;
        const x = u.valToPos(run.step[at], "x", true);
        if (x - last < size) continue;
        last = x;
        const y = lost ? u.bbox.top + 2 * size : u.valToPos(run.norm[at], "y", true);
        ctx.beginPath();
        ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
        ctx.moveTo(x - size, y + size); ctx.lineTo(x + size, y - size);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  // ---------------------------------------------------------------- heat maps

  function heatColour(share) {
    const place = Math.min(Math.max(share, 0), 1) * (HEAT_COLOURS.length - 1);
    const low = Math.floor(place), high = Math.min(low + 1, HEAT_COLOURS.length - 1);
    return HEAT_COLOURS[low].map((c, i) => Math.round(c + (HEAT_COLOURS[high][i] - c) * (place - low)));
  }

  // The steps that a column of the heat map stands for: half-way to its neighbours, but no further
  // than is usual, so that what was logged between two intervals does not fill a gap.
  function heatEdges(heat) {
    if (heat.edges) return heat.edges;
    const { first, last } = heat, num = first.length, gaps = [];
    for (let i = 1; i < num; i++) gaps.push(first[i] - last[i - 1]);
    const usual = gaps.length ? gaps.slice().sort((a, b) => a - b)[Math.floor(0.9 * (gaps.length - 1))] : 1;
    const left = new Float64Array(num), right = new Float64Array(num);
    for (let i = 0; i < num; i++) {
      left[i] = first[i] - Math.min(i ? gaps[i - 1] : usual, usual) / 2;
      right[i] = last[i] + Math.min(i < num - 1 ? gaps[i] : usual, usual) / 2;
    }
    heat.edges = { left, right };
    return heat.edges;
  }

  function drawHeat(u, figure) {
    const { heat } = figure, rows = heat[heat.mode], num = heat.first.length;
    const width = Math.max(1, Math.round(u.bbox.width)), { left, right } = heatEdges(heat);
    const image = new ImageData(width, rows.length), cells = new Int16Array(width * rows.length).fill(-1);
    const scale = width / (state.high - state.low);
    for (let i = Math.max(search(heat.last, state.low) - 1, 0); i < num && left[i] <= state.high; i++) {
      const from = Math.max(0, Math.floor((left[i] - state.low) * scale));
      const till = Math.min(width, Math.max(from + 1, Math.ceil((right[i] - state.low) * scale)));
      for (let row = 0; row < rows.length; row++) {
        const share = heat.shares[rows[row] * num + i];
        for (let x = from; x < till; x++) {
          const at = row * width + x;
          if (share > cells[at]) cells[at] = share;
        }
      }
    }
    const bad = css("--bad").match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
    for (let at = 0; at < cells.length; at++) {
      if (cells[at] < 0) continue;
      const colour = cells[at] === BAD_SHARE ? bad : heatColour(cells[at] / WHOLE_SHARE);
      image.data.set([...colour, 255], 4 * at);
    }
    const canvas = element("canvas", { width, height: rows.length });
    canvas.getContext("2d").putImageData(image, 0, 0);
    u.ctx.save();
    u.ctx.imageSmoothingEnabled = false;
    u.ctx.drawImage(canvas, u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    u.ctx.restore();
  }

  function captionOfHeat(figure) {
    if (!figure.heat || figure.caption_.childElementCount) return;
    const { heat } = figure, bar = element("canvas", { class: "bar", width: "180", height: "12", "aria-hidden": "true" });
    const context = bar.getContext("2d");
    for (let x = 0; x < 180; x++) {
      context.fillStyle = `rgb(${heatColour(x / 179).join()})`;
      context.fillRect(x, 0, 1, 12);
    }
    let text = `Largest share of the ${heat.what} by ${heat.kind} among the steps of each column; `
      + "empty where nothing was logged.";
    if (heat.byMean.length < heat.total) {
      text += ` ${heat.byMean.length} of ${heat.total} are shown; those beyond the largest by mean `
        + `have ${percent(heat.restOfMean)} of it on average.`;
    }
    if (heat.removed.length) {
      text += ` Names without their ${heat.removed.map((word) => `“${word}”`).join(" and ")}.`;
    }
    figure.caption_.replaceChildren(
      element("span", { class: "scale" }, "0 % ", bar, " 100 % ", element("span", { class: "bad" }), " not finite"),
      ` ${text}`,
    );
  }

  // ---------------------------------------------------------------- moving

  let waiting = false;
  function setRange(low, high) {
    const span = Math.max(high - low, SMALLEST_WINDOW), whole_ = ends[1] - ends[0];
    if (span >= whole_) [low, high] = ends;
    else {
      const middle = (low + high) / 2;
      low = Math.min(Math.max(middle - span / 2, ends[0]), ends[1] - span);
      high = low + span;
    }
    state.low = low;
    state.high = high;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; refresh(); });
  }
  function showAll() { setRange(...ends); }
  function zoom(factor, around) {
    const picked = state.pick && runs[state.pick.run].step[state.pick.at];
    const inside = picked !== null && picked >= state.low && picked <= state.high;
    const middle = around ?? (inside ? picked : (state.low + state.high) / 2);
    setRange(middle - (middle - state.low) * factor, middle + (state.high - middle) * factor);
  }
  function pan(share) {
    const by = share * (state.high - state.low);
    setRange(state.low + by, state.high + by);
  }
  function showRange() {
    from.value = Math.round(state.low);
    to.value = Math.round(state.high);
  }

  function wheelTurned(u, event) {
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      zoom(Math.exp(event.deltaY * 0.002), u.posToVal(event.offsetX, "x"));
    } else if (event.shiftKey) {
      event.preventDefault();
      pan((event.deltaX || event.deltaY) / 600);
    }
  }

  function startPan(u, event) {
    event.preventDefault();
    const start = event.clientX, { low, high } = state, width = u.over.clientWidth;
    const moved = (now) => {
      const by = (start - now.clientX) / width * (high - low);
      setRange(low + by, high + by);
    };
    const ended = () => {
      document.removeEventListener("mousemove", moved);
      document.removeEventListener("mouseup", ended);
    };
    document.addEventListener("mousemove", moved);
    document.addEventListener("mouseup", ended);
  }

  // One finger: sideways moves, a tap points. Two fingers: zoom.
  function watchTouch(figure, over) {
    const touches = new Map();
    let begun = null;
    const begin = () => { begun = { low: state.low, high: state.high, at: [...touches.values()] }; };
    over.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "touch") return;
      touches.set(event.pointerId, event.offsetX);
      begin();
      pointedAt(figure, event);
    });
    over.addEventListener("pointermove", (event) => {
      if (!touches.has(event.pointerId)) return;
      touches.set(event.pointerId, event.offsetX);
      const at = [...touches.values()], span = begun.high - begun.low, width = over.clientWidth;
      if (at.length === 1) {
        const by = (begun.at[0] - at[0]) / width * span;
        if (Math.abs(begun.at[0] - at[0]) > 4) setRange(begun.low + by, begun.high + by);
      } else if (at.length === 2 && begun.at.length === 2) {
        const factor = Math.abs(begun.at[0] - begun.at[1]) / Math.max(Math.abs(at[0] - at[1]), 10);
        const middle = begun.low + (begun.at[0] + begun.at[1]) / 2 / width * span;
        const place = (at[0] + at[1]) / 2 / width;
        setRange(middle - place * span * factor, middle + (1 - place) * span * factor);
      }
    });
    for (const name of ["pointerup", "pointercancel"]) {
      over.addEventListener(name, (event) => { if (touches.delete(event.pointerId)) begin(); });
    }
  }

  function keyPressed(figure, event) {
    const ways = {
      ArrowLeft: () => (event.shiftKey ? pan(-0.1) : stepPick(figure, -1)),
      ArrowRight: () => (event.shiftKey ? pan(0.1) : stepPick(figure, 1)),
      ArrowUp: () => otherRun(figure, -1), ArrowDown: () => otherRun(figure, 1),
      "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "−": () => zoom(2),
      0: showAll, Home: showAll, Escape: hideTip,
    };
    const action = ways[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  }

  // ---------------------------------------------------------------- pointing

  function firstPick() {
    const run = runs.find((one) => one.on) || runs[0];
    let at = Math.min(search(run.step, state.low), run.kept - 1);
    for (let i = at; i < run.kept && run.step[i] <= state.high; i++) {
      if (run.norm[i] > run.norm[at] || Number.isNaN(run.norm[at])) at = i;
    }
    state.pick = { run: run.index, at };
  }

  function stepPick(figure, by) {
    state.pick || firstPick();
    const run = runs[state.pick.run];
    const points = !figure.heat && figure.drawn[run.index];
    const list_ = points && points.at.length ? points.at : null;
    if (list_) {
      let place = search(list_, state.pick.at);
      if (list_[place] !== state.pick.at && by > 0) place -= 1;
      state.pick = { run: run.index, at: list_[Math.min(Math.max(place + by, 0), list_.length - 1)] };
    } else {
      state.pick = { run: run.index, at: Math.min(Math.max(state.pick.at + by, 0), run.kept - 1) };
    }
    const step = run.step[state.pick.at];
    if (step < state.low || step > state.high) {
      const half = (state.high - state.low) / 2;
      setRange(step - half, step + half);
    }
    placePick(figure);
  }

  function otherRun(figure, by) {
    state.pick || firstPick();
    const on = runs.filter((run) => run.on);
    if (!on.length) return;
    const now = on.findIndex((run) => run.index === state.pick.run);
    const next = on[(now + by + on.length) % on.length];
    const step = runs[state.pick.run].step[state.pick.at];
    state.pick = { run: next.index, at: nearest(next.step, step) };
    placePick(figure);
  }

  function pointedAt(figure, event) {
    const { plot } = figure, left = event.offsetX, top = event.offsetY;
    if (figure.heat) return pointedAtHeat(figure, left, top);
    let best = null, least = Infinity;
    const none = figure.id === "norm" ? 0 : plot.over.clientHeight;   // where × stands; where 0 is
    figure.drawn.forEach((points, index) => {
      if (!points || !points.x.length) return;
      const middle = nearest(points.x, plot.posToVal(left, "x"));
      const consider = (i) => {
        const x = plot.valToPos(points.x[i], "x") - left;
        const y = (points.y[i] === null ? none : plot.valToPos(points.y[i], "y")) - top;
        const distance = Math.abs(x) <= NEAR_PX ? Math.hypot(x, y) : 1e6 + Math.abs(x) + Math.abs(y) / 1e3;
        if (distance < least) { least = distance; best = { run: index, at: points.at[i] }; }
        return Math.abs(x) <= NEAR_PX;
      };
      consider(middle);
      for (let i = middle - 1; i >= 0 && consider(i); i--);
      for (let i = middle + 1; i < points.x.length && consider(i); i++);
    });
    if (!best) return undefined;
    state.pick = best;
    return placePick(figure);
  }

  function pointedAtHeat(figure, left, top) {
    const { heat, plot } = figure, rows = heat[heat.mode], run = runs[heat.run];
    const step = plot.posToVal(left, "x");
    const row = rows[Math.min(Math.max(Math.floor(rows.length - plot.posToVal(top, "y")), 0), rows.length - 1)];
    const near = NEAR_PX / 4 * (state.high - state.low) / plot.over.clientWidth;
    const { left: starts, right: stops } = heatEdges(heat), num = heat.first.length;
    let best = -1;                                   // the largest share within the pixels around
    for (let i = Math.max(search(heat.last, step - near) - 1, 0); i < num && starts[i] <= step + near; i++) {
      if (stops[i] < step - near) continue;
      if (best < 0 || heat.shares[row * num + i] > heat.shares[row * num + best]) best = i;
    }
    if (best < 0) { hideTip(); return; }
    const first = heat.first[best], last = heat.last[best], code = heat.shares[row * num + best];
    state.pick = { run: heat.run, at: nearest(run.step, first) };
    for (const one of figures) placeCross(one, first);
    const steps = first === last ? `step ${whole(first)}` : `steps ${whole(first)} – ${whole(last)}`;
    fillTip(run, steps, [
      [heat.kind, heat.names[row]],
      [first === last ? "share" : "largest share", shareText(code)],
    ]);
    placeTip(figure, left, top);
  }

  function shareText(code) {
    if (code === BAD_SHARE) return "not finite";
    return code === 0 ? "under 0.2\u00a0%" : percent(code / WHOLE_SHARE);
  }

  function placeCross(figure, step) {
    if (!figure.plot || !figure.cross) return;
    const { pick } = state, { plot, cross, dot } = figure;
    const run = pick && runs[pick.run];
    const at = step ?? (run && run.step[pick.at]);
    const hidden = !run || at < state.low || at > state.high;
    cross.hidden = dot.hidden = hidden;
    if (hidden) return;
    const x = plot.valToPos(at, "x");
    cross.style.transform = `translateX(${x}px)`;
    const value = !figure.heat && figure.of(run)[pick.at] * (figure.factor || 1);
    dot.hidden = figure.heat || step !== undefined || !run.on || !Number.isFinite(value)
      || (figure.scale === "log" && value <= 0);
    if (dot.hidden) return;
    dot.style.transform = `translate(${x}px, ${plot.valToPos(value, "y")}px)`;
    dot.style.background = css(run.colour);
  }

  function placePick(figure) {
    for (const one of figures) placeCross(one);
    const { run: index, at } = state.pick, run = runs[index];
    const { plot } = figure, flags = run.flags[at], rows = [["norm", significant(run.norm[at])]];
    if (run.norm[at] > 0 && run.median[at] > 0) {
      rows.push(["× running median", significant(run.norm[at] / run.median[at], 3)]);
    }
    const bound = run.threshold[at];
    rows.push(["threshold", Number.isFinite(bound) ? significant(bound) + (run.clamps ? " (of elements)" : "") : "none, or several"]);
    rows.push(["coefficient", Number.isFinite(run.coef[at]) ? significant(run.coef[at]) : "–"]);
    if (run.top[at] >= 0) {
      const share = run.share[at];
      rows.push(["largest part", `${run.parts[run.top[at]]}, ${share > 1.5 ? "not finite" : percent(share)}`]);
    }
    rows.push(["clip rate", Number.isFinite(run.rate[at]) ? percent(run.rate[at]) : "–"]);
    const done = flags & SKIPPED ? "skipped" : flags & CLIPPED ? "clipped" : "";
    fillTip(run, `step ${whole(run.step[at])}${done && `, ${done}`}`, rows, others(run, run.step[at]));
    const value = !figure.heat && figure.of(run)[at] * (figure.factor || 1);
    const y = Number.isFinite(value) && value !== false && !(figure.scale === "log" && value <= 0)
      ? plot.valToPos(value, "y") : 12;
    placeTip(figure, plot.valToPos(run.step[at], "x"), y);
  }

  function others(run, step) {
    return runs.filter((one) => one.on && one !== run && step >= one.step[0] && step <= one.step[one.kept - 1])
      .slice(0, MOST_OTHERS)
      .map((one) => [one.name, significant(one.norm[nearest(one.step, step)])]);
  }

  function fillTip(run, heading, rows, more = []) {
    const facts = element("dl");
    for (const [name, value] of rows) facts.append(element("dt", { text: name }), element("dd", { text: value }));
    const head = element("div", { class: "tip-head" });
    if (runs.length > 1) {
      const swatch = element("canvas", { class: "swatch", width: "60", height: "20" });
      drawSwatch(swatch, run);
      head.append(swatch, element("span", { text: run.name }));
    }
    tip.replaceChildren(head, element("strong", { text: heading }), facts);
    if (more.length) {
      const list_ = element("dl", { class: "others" });
      for (const [name, value] of more) list_.append(element("dt", { text: name }), element("dd", { text: value }));
      tip.append(list_);
    }
  }

  function placeTip(figure, left, top) {
    tip.hidden = false;
    const box = figure.plot.over.getBoundingClientRect();
    if (isNarrow(root.clientWidth)) {                // beside the pointer it would hide the figure
      const low = box.top + top < 0.55 * innerHeight;
      tip.style.transform = `translate(4px, ${low ? innerHeight - tip.offsetHeight - 4 : 4}px)`;
      return;
    }
    const width = tip.offsetWidth, height = tip.offsetHeight, room = 14;
    let x = box.left + left + room;
    if (x + width > root.clientWidth - 4) x = box.left + left - room - width;
    x = Math.max(4, Math.min(x, root.clientWidth - width - 4));
    let y = box.top + top + room;
    if (y + height > innerHeight - 4) y = box.top + top - room - height;
    y = Math.max(4, y);
    tip.style.transform = `translate(${x}px, ${y}px)`;
  }

  function hideTip() { tip.hidden = true; }

  // ---------------------------------------------------------------- tables

  function goTo(number, step) {
    const run = runs[number], norm = figures[0];
    if (!run.on) { run.on = boxes[number].box.checked = true; rebuild(); }
    const half = Math.max(25, Math.round((ends[1] - ends[0]) / 100));
    setRange(step - half, step + half);
    state.pick = { run: number, at: nearest(run.step, step) };
    norm.box.focus({ preventScroll: true });
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    document.getElementById("norm").scrollIntoView({ behavior: still ? "auto" : "smooth", block: "center" });
    requestAnimationFrame(() => requestAnimationFrame(() => { for (const one of figures) placeCross(one); }));
  }
  document.addEventListener("click", (event) => {
    const row = event.target.closest("table.steps tbody tr");
    if (!row || event.target.closest("details") || String(getSelection())) return;
    const { run, step } = row.querySelector("button.go").dataset;
    goTo(Number(run), Number(step));
  });

  // ---------------------------------------------------------------- start, width, colours, paper

  let width = 0;
  new ResizeObserver(() => {
    if (home.clientWidth === width || root.dataset.print) return;
    width = home.clientWidth;
    rebuild();
  }).observe(home);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);
  let opened = [];
  function paper(on) {
    if (on === Boolean(root.dataset.print)) return;
    if (on) {
      root.dataset.print = "yes";
      opened = [...document.querySelectorAll("details:not([open])")];
    } else delete root.dataset.print;
    for (const details of opened) details.open = on;
    rebuild();
  }
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
  matchMedia("print").addEventListener("change", (event) => paper(event.matches));
  addEventListener("scroll", () => {
    const focused = state.pick && !tip.hidden && figures.find(({ box }) => box === document.activeElement);
    if (focused) placePick(focused); else hideTip();
  }, { passive: true });
  width = home.clientWidth;
  rebuild();
  root.dataset.ready = "yes";
})();
