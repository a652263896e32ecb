(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const byId = (id) => document.getElementById(id);
  const count = data.x.length;

  // --- the map: points on one canvas, the ring around the selected cell on another

  const field = byId("cells"), cursor = byId("cursor"), legend = byId("legend");
  let mode = "truth", highlighted = null;

  const outcome = (i) =>
    data.truth[i] < 0 ? 3 : data.predicted[i] < 0 ? 2 : data.predicted[i] === data.truth[i] ? 0 : 1;
  const groupOf = (i) => (mode === "outcome" ? outcome(i) : data[mode][i]);

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

  const reachable = (i) => highlighted === null || groupOf(i) === highlighted;
  const map = pointMap({ ...data, field, cursor, smallest: 1.4, reachable, choose });

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
    const pen = map.prepare(field);
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
      for (const i of members.get(group.key) || []) mark(pen, group.shape, map.px[i], map.py[i], map.radius);
    }
    map.ring();
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

  const nameOf = (number, none) => (number < 0 ? none : data.classes[number].name);

  function choose(i) {
    if (i < 0 || i >= count) return;
    map.chosen = i;
    const confidence = data.confidence[i], result = outcome(i), sign = byId("card-mark");
    sign.textContent = ["✓", "✗", "–", ""][result];
    sign.className = ["right", "wrong", "", ""][result];
    byId("card-cell").textContent = data.cell[i];
    byId("card-predicted").textContent = nameOf(data.predicted[i], "not determined");
    byId("card-truth").textContent = nameOf(data.truth[i], "no label");
    byId("card-bar").style.width = `${100 * (confidence || 0)}%`;
    byId("card-confidence").textContent = confidence === null ? "not available" : `${Math.round(100 * confidence)}%`;
    byId("card-text").textContent = data.texts[data.text[i]] || "";
    map.ring();
  }

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
    map.place();
    draw();
  }
  refresh();
  choose(0);
  new ResizeObserver(() => { map.place(); draw(); }).observe(field);
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
