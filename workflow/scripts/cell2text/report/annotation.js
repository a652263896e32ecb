(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const unpack = (text) => new Uint16Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
  const format = (number) => number.toLocaleString("en");
  const count = data.cells.length;
  const x = unpack(data.x), y = unpack(data.y), text = unpack(data.text);
  const confidence = unpack(data.confidence), guessConfidence = unpack(data.guess_confidence);
  const columns = data.columns;
  for (const column of Object.values(columns)) column.codes = unpack(column.codes);
  const BOX = 16; // side of a box of the lookup grid, in CSS pixels
  const MARGIN = 22;
  const MOST_LISTED = 50;

  // --- the map: points on one canvas, the ring around the chosen cell on another

  const field = byId("cells"), cursor = byId("cursor"), legend = byId("legend");
  const px = new Float32Array(count), py = new Float32Array(count);
  let mode = "cell_type", selected = null, chosen = 0, boxes = new Map(), radius = 4;

  const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const nameOf = (column, i) => columns[column].names[columns[column].codes[i]] ?? columns[column].none;
  const textOf = (i) => data.texts[text[i]].map((number) => data.sentences[number]).join(" ");
  const percent = (value) => (value > 100 ? "" : `${value}%`);

  // groups of the legend: the names with a colour, all other names, and no value
  function groupOf(i) {
    const { codes, names, sizes } = columns[mode];
    return codes[i] === names.length ? -1 : Math.min(codes[i], sizes.length);
  }

  function groups() {
    const { names, sizes, colours, none, empty } = columns[mode];
    const other = data.total - empty - sizes.reduce((sum, size) => sum + size, 0);
    return [
      ...sizes.map((size, key) => ({ key, name: names[key], size, colour: colours[key], shape: "disc" })),
      { key: sizes.length, name: "other", size: other, colour: colourOf("--muted"), shape: "disc" },
      { key: -1, name: none, size: empty, colour: colourOf("--muted"), shape: "ring" },
    ].filter((group) => group.size);
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
    radius = Math.max(1, Math.min(6, (width / 10) / Math.sqrt(count)));
    boxes = new Map();
    for (let i = 0; i < count; i++) {
      px[i] = left + x[i] * scale;
      py[i] = top + (data.height - y[i]) * scale;
      const key = (px[i] / BOX | 0) * 65536 + (py[i] / BOX | 0);
      if (boxes.has(key)) boxes.get(key).push(i);
      else boxes.set(key, [i]);
    }
  }

  function mark(pen, shape, i, size) {
    if (size < 2) { // small points are drawn faster as squares
      pen.fillRect(px[i] - size, py[i] - size, 2 * size, 2 * size);
      return;
    }
    pen.beginPath();
    pen.arc(px[i], py[i], size, 0, 2 * Math.PI);
    if (shape === "ring") pen.stroke();
    else pen.fill();
  }

  function draw() {
    const pen = prepare(field);
    pen.lineWidth = 1.5;
    const members = new Map(groups().map((group) => [group.key, []]));
    for (let i = 0; i < count; i++) members.get(groupOf(i)).push(i);
    // rare groups on top of frequent ones, selected cells on top of the others
    const order = groups().sort((a, b) => b.size - a.size);
    pen.fillStyle = colourOf("--line");
    for (let i = 0; selected && i < count; i++) if (!selected[i]) mark(pen, "disc", i, radius);
    for (const group of order) {
      pen.globalAlpha = group.key < 0 ? 0.5 : 0.85;
      pen.fillStyle = pen.strokeStyle = group.colour;
      for (const i of members.get(group.key)) if (reachable(i)) mark(pen, group.shape, i, radius);
    }
    ring();
  }

  function ring() {
    const pen = prepare(cursor);
    pen.strokeStyle = colourOf("--ink");
    pen.lineWidth = 2;
    mark(pen, "ring", chosen, radius + 4);
  }

  function listGroups() {
    legend.replaceChildren();
    for (const group of groups()) {
      const item = document.createElement("li"), button = document.createElement("button");
      const swatch = document.createElement("i"), size = document.createElement("span");
      button.type = "button";
      swatch.className = group.shape;
      swatch.style.background = swatch.style.borderColor = group.colour;
      size.className = "n";
      size.textContent = format(group.size);
      button.append(swatch, group.name, size);
      button.addEventListener("click", () => {
        const again = button.getAttribute("aria-pressed") === "true";
        if (again) select(null);
        else select((i) => groupOf(i) === group.key, group.name, button);
      });
      button.setAttribute("aria-pressed", "false");
      item.append(button);
      legend.append(item);
    }
  }

  // --- the selection: by a group of the legend, a cluster or the search, one at a time

  function select(wanted, name = "", button = null) {
    let found = 0;
    selected = wanted && new Uint8Array(count);
    for (let i = 0; wanted && i < count; i++) found += selected[i] = wanted(i) ? 1 : 0;
    for (const pressed of document.querySelectorAll("[aria-pressed=true]")) pressed.setAttribute("aria-pressed", "false");
    if (button) button.setAttribute("aria-pressed", "true");
    list(null);
    const all = count < data.total ? "cells of the map" : "cells";
    byId("status").textContent = wanted ? `${format(found)} of ${format(count)} ${all}: ${name}` : "";
    byId("clear").hidden = !wanted;
    if (found && !selected[chosen]) choose(selected.indexOf(1));
    draw();
    return found;
  }

  const reachable = (i) => !selected || selected[i];

  function nearest(left, top) {
    let best = -1, least = BOX * BOX;
    const column = left / BOX | 0, row = top / BOX | 0;
    for (let a = column - 1; a <= column + 1; a++) {
      for (let b = row - 1; b <= row + 1; b++) {
        for (const i of boxes.get(a * 65536 + b) || []) {
          const distance = (px[i] - left) ** 2 + (py[i] - top) ** 2;
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

  function choose(i) {
    if (i < 0) return;
    chosen = i;
    byId("card-cell").textContent = data.cells[i];
    for (const name of ["cell_type", "guess", "cluster", "novelty", "flag"]) byId(`card-${name}`).textContent = nameOf(name, i);
    const tissue = nameOf("tissue", i), guess = nameOf("tissue_guess", i);
    byId("card-tissue").textContent = guess === tissue ? tissue : `${tissue} (guess: ${guess})`;
    byId("card-bar").style.width = percent(confidence[i]) || 0;
    byId("card-confidence").textContent = percent(confidence[i]) || "none";
    byId("card-guess_confidence").textContent = percent(guessConfidence[i]);
    byId("card-text").textContent = textOf(i);
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

  function showMap() {
    byId("map").scrollIntoView();
    cursor.focus({ preventScroll: true });
  }

  for (const button of document.querySelectorAll("[data-cluster]")) {
    button.addEventListener("click", () => {
      const code = Number(button.dataset.cluster);
      select((i) => columns.cluster.codes[i] === code, button.textContent, button);
      showMap();
    });
  }

  // --- the search

  const query = byId("query"), scope = byId("field");
  const lower = (names) => names.map((name) => name.toLowerCase());
  const cellNames = lower(data.cells);
  for (const column of Object.values(columns)) column.lower = lower(column.names);
  const markers = data.markers.map(lower);

  // clusters and genes with exactly this name, or else those that contain it
  function named(lists, wanted) {
    const exact = lists.map((names) => names.includes(wanted));
    return exact.includes(true) ? exact : lists.map((names) => names.some((name) => name.includes(wanted)));
  }

  function matcher(wanted) {
    const holding = (...names) => names.map((name) => {
      const found = columns[name].lower.map((one) => one.includes(wanted));
      return (i) => found[columns[name].codes[i]];
    });
    const ofCluster = (lists) => {
      const found = named(lists, wanted);
      return (i) => found[columns.cluster.codes[i]];
    };
    const tests = {
      name: () => [(i) => cellNames[i].includes(wanted)],
      type: () => holding("cell_type", "guess"),
      tissue: () => holding("tissue", "tissue_guess"),
      programme: () => holding("programmes"),
      cluster: () => [ofCluster(columns.cluster.lower.map((name) => [name]))],
      marker: () => [ofCluster(markers)],
    };
    const chosenTests = (scope.value === "all" ? Object.values(tests) : [tests[scope.value]]).flatMap((make) => make());
    return (i) => chosenTests.some((test) => test(i));
  }

  function list(found) {
    byId("found").replaceChildren();
    byId("results").hidden = found === null;
    if (found === null) return;
    const cells = found ? `${format(found)} of ${format(count)} cells match` : "No cell matches";
    byId("matches").textContent = found > MOST_LISTED ? `${cells}; the first ${MOST_LISTED} are listed.` : `${cells}.`;
    for (let i = 0, listed = 0; i < count && listed < MOST_LISTED && found; i++) {
      if (!selected[i]) continue;
      listed++;
      const item = document.createElement("li"), button = document.createElement("button");
      const about = document.createElement("span"), words = document.createElement("p");
      button.type = "button";
      button.className = "pick";
      button.textContent = data.cells[i];
      button.addEventListener("click", () => { choose(i); showMap(); });
      about.className = "note";
      about.textContent = `${nameOf("cell_type", i)} ${percent(confidence[i])} · guess: ${nameOf("guess", i)} ` +
        `${percent(guessConfidence[i])} · cluster ${nameOf("cluster", i)}`;
      words.className = "prose";
      words.textContent = textOf(i);
      item.append(button, about, words);
      byId("found").append(item);
    }
  }

  function search() {
    const wanted = query.value.trim().toLowerCase();
    if (wanted) list(select(matcher(wanted), `search for “${query.value.trim()}”`));
    else select(null);
  }
  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });
  scope.addEventListener("change", search);
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  byId("clear").addEventListener("click", () => {
    query.value = "";
    select(null);
    cursor.focus({ preventScroll: true });
  });

  byId("mode").addEventListener("change", (event) => {
    mode = event.target.value;
    listGroups();
    draw();
  });
  const refresh = () => {
    listGroups();
    place();
    draw();
  };
  refresh();
  choose(0);
  new ResizeObserver(() => { place(); draw(); }).observe(field);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
})();
