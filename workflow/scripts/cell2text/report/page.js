(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const byId = (id) => document.getElementById(id);
  const count = data.x.length;
  const BOX = 16; // side of a box of the lookup grid, in CSS pixels
  const MARGIN = 22;

  // --- the map: points on one canvas, the ring around the selected cell on another

  const field = byId("cells"), cursor = byId("cursor"), legend = byId("legend");
  const px = new Float32Array(count), py = new Float32Array(count);
  let mode = "truth", highlighted = null, chosen = 0, boxes = new Map(), radius = 4;

  const outcome = (i) =>
    data.truth[i] < 0 ? 3 : data.predicted[i] < 0 ? 2 : data.predicted[i] === data.truth[i] ? 0 : 1;
  const groupOf = (i) => (mode === "outcome" ? outcome(i) : data[mode][i]);
  const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function groups() {
    if (mode !== "outcome") {
      const none = mode === "predicted" ? "not determined" : "no label";
      return [
        ...data.classes.map((entry, key) => ({ key, name: entry.name, colour: entry.colour, shape: "disc" })),
        { key: -1, name: none, colour: colourOf("--muted"), shape: "ring" },
      ];
    }
    return [
      { key: 0, name: "correct", colour: colourOf("--accent"), shape: "disc" },
      { key: 1, name: "wrong", colour: colourOf("--wrong"), shape: "diamond" },
      { key: 2, name: "not determined", colour: colourOf("--muted"), shape: "ring" },
      { key: 3, name: "no label", colour: colourOf("--line"), shape: "disc" },
    ];
  }

  function prepare(canvas) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    return pen;
  }

  function place() {
    const width = field.clientWidth - 2 * MARGIN, height = field.clientHeight - 2 * MARGIN;
    const scale = Math.min(width / data.width, height / data.height);
    const left = MARGIN + (width - data.width * scale) / 2, top = MARGIN + (height - data.height * scale) / 2;
    radius = Math.max(1.4, Math.min(6, (width / 10) / Math.sqrt(count)));
    boxes = new Map();
    for (let i = 0; i < count; i++) {
      px[i] = left + data.x[i] * scale;
      py[i] = top + (data.height - data.y[i]) * scale;
      const key = (px[i] / BOX | 0) * 65536 + (py[i] / BOX | 0);
      if (boxes.has(key)) boxes.get(key).push(i);
      else boxes.set(key, [i]);
    }
  }

  function mark(pen, shape, x, y, size) {
    pen.beginPath();
    if (shape === "diamond") {
      pen.moveTo(x, y - 1.5 * size);
      pen.lineTo(x + 1.5 * size, y);
      pen.lineTo(x, y + 1.5 * size);
      pen.lineTo(x - 1.5 * size, y);
      pen.closePath();
    } else pen.arc(x, y, size, 0, 2 * Math.PI);
    if (shape === "ring") pen.stroke();
    else pen.fill();
  }

  function draw() {
    const pen = prepare(field);
    pen.clearRect(0, 0, field.clientWidth, field.clientHeight);
    pen.lineWidth = 1.5;
    const members = new Map();
    for (let i = 0; i < count; i++) {
      const key = groupOf(i);
      if (members.has(key)) members.get(key).push(i);
      else members.set(key, [i]);
    }
    // draw the highlighted class last, on top of the others
    const order = groups().sort((a, b) => (a.key === highlighted) - (b.key === highlighted));
    for (const group of order) {
      pen.globalAlpha = highlighted === null || highlighted === group.key ? 0.85 : 0.1;
      pen.fillStyle = pen.strokeStyle = group.colour;
      for (const i of members.get(group.key) || []) mark(pen, group.shape, px[i], py[i], radius);
    }
    ring();
  }

  function ring() {
    const pen = prepare(cursor);
    if (!count) return;
    pen.strokeStyle = colourOf("--ink");
    pen.lineWidth = 2;
    mark(pen, "ring", px[chosen], py[chosen], radius + 4);
  }

  function listGroups() {
    const sizes = new Map();
    for (let i = 0; i < count; i++) sizes.set(groupOf(i), (sizes.get(groupOf(i)) || 0) + 1);
    legend.replaceChildren();
    for (const group of groups()) {
      if (!sizes.has(group.key)) continue;
      const item = document.createElement("li"), button = document.createElement("button");
      const swatch = document.createElement("i"), size = document.createElement("span");
      button.type = "button";
      button.setAttribute("aria-pressed", String(group.key === highlighted));
      swatch.className = group.shape;
      swatch.style.background = swatch.style.borderColor = group.colour;
      size.className = "n";
      size.textContent = sizes.get(group.key).toLocaleString("en");
      button.append(swatch, group.name, size);
      button.addEventListener("click", () => {
        highlighted = highlighted === group.key ? null : group.key;
        for (const other of legend.querySelectorAll("button")) {
          other.setAttribute("aria-pressed", String(other === button && highlighted !== null));
        }
        draw();
      });
      item.append(button);
      legend.append(item);
    }
  }

  const reachable = (i) => highlighted === null || groupOf(i) === highlighted;

  function nearest(x, y) {
    let best = -1, least = BOX * BOX;
    const column = x / BOX | 0, row = y / BOX | 0;
    for (let a = column - 1; a <= column + 1; a++) {
      for (let b = row - 1; b <= row + 1; b++) {
        for (const i of boxes.get(a * 65536 + b) || []) {
          const distance = (px[i] - x) ** 2 + (py[i] - y) ** 2;
          if (distance < least && reachable(i)) { least = distance; best = i; }
        }
      }
    }
    return best;
  }

  function neighbour(dx, dy) {
    let best = -1, least = Infinity;
    for (let i = 0; i < count; i++) {
      const along = (px[i] - px[chosen]) * dx + (py[i] - py[chosen]) * dy;
      const across = Math.abs((px[i] - px[chosen]) * dy - (py[i] - py[chosen]) * dx);
      if (along <= 0 || along < across || !reachable(i)) continue;
      if (along + across < least) { least = along + across; best = i; }
    }
    return best;
  }

  const nameOf = (number, none) => (number < 0 ? none : data.classes[number].name);

  function choose(i) {
    if (i < 0 || i >= count) return;
    chosen = i;
    const confidence = data.confidence[i], result = outcome(i), sign = byId("card-mark");
    sign.textContent = ["✓", "✗", "–", ""][result];
    sign.className = ["right", "wrong", "", ""][result];
    byId("card-cell").textContent = data.cell[i];
    byId("card-predicted").textContent = nameOf(data.predicted[i], "not determined");
    byId("card-truth").textContent = nameOf(data.truth[i], "no label");
    byId("card-bar").style.width = `${100 * (confidence || 0)}%`;
    byId("card-confidence").textContent = confidence === null ? "not available" : `${Math.round(100 * confidence)}%`;
    byId("card-text").textContent = data.texts[data.text[i]] || "";
    ring();
  }

  function follow(event) {
    const frame = cursor.getBoundingClientRect();
    choose(nearest(event.clientX - frame.left, event.clientY - frame.top));
  }
  cursor.addEventListener("pointermove", follow);
  cursor.addEventListener("pointerdown", follow);
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  cursor.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    choose(neighbour(...ARROWS[event.key]));
  });
  for (const button of document.querySelectorAll("[data-mode]")) {
    button.addEventListener("click", () => {
      mode = button.dataset.mode;
      highlighted = null;
      for (const other of document.querySelectorAll("[data-mode]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      refresh();
    });
  }

  function refresh() {
    listGroups();
    place();
    draw();
  }
  refresh();
  choose(0);
  new ResizeObserver(() => { place(); draw(); }).observe(field);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);

  // --- the confusion matrix: a readout of the field under the pointer or the keyboard focus

  const matrix = byId("matrix"), readout = byId("readout");
  const rows = [...matrix.tBodies[0].rows].map((row) => [...row.querySelectorAll(".cell")]);
  if (rows.length && rows[0].length) rows[0][0].tabIndex = 0;
  const show = (event) => {
    if (event.target.classList.contains("cell")) readout.textContent = event.target.title;
  };
  matrix.addEventListener("pointerover", show);
  matrix.addEventListener("focusin", show);
  matrix.addEventListener("keydown", (event) => {
    const row = rows.findIndex((cells) => cells.includes(event.target));
    if (row < 0 || !(event.key in ARROWS)) return;
    const [dx, dy] = ARROWS[event.key];
    const next = (rows[row + dy] || [])[rows[row].indexOf(event.target) + dx];
    event.preventDefault();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  // --- print with all details open
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
