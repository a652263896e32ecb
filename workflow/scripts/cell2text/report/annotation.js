(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const unpack = (text) => new Uint16Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
  const format = (number) => number.toLocaleString("en");
  const count = data.cells.length;
  const text = unpack(data.text);
  const confidence = unpack(data.confidence), guessConfidence = unpack(data.guess_confidence);
  const columns = data.columns;
  for (const column of Object.values(columns)) column.codes = unpack(column.codes);
  const MOST_LISTED = 50;

  // --- the map: points on one canvas, the ring around the chosen cell on another

  const field = byId("cells"), cursor = byId("cursor"), legend = byId("legend");
  let mode = "cell_type", selected = null;
  const reachable = (i) => !selected || selected[i];
  const places = { x: unpack(data.x), y: unpack(data.y), width: data.width, height: data.height };
  const map = pointMap({ ...places, field, cursor, smallest: 1, reachable, choose });

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

  function mark(pen, shape, i, size) {
    if (size < 2) { // small points are drawn faster as squares
      pen.fillRect(map.px[i] - size, map.py[i] - size, 2 * size, 2 * size);
      return;
    }
    pen.beginPath();
    pen.arc(map.px[i], map.py[i], size, 0, 2 * Math.PI);
    if (shape === "ring") pen.stroke();
    else pen.fill();
  }

  function draw() {
    const pen = map.prepare(field);
    pen.lineWidth = 1.5;
    const members = new Map(groups().map((group) => [group.key, []]));
    for (let i = 0; i < count; i++) members.get(groupOf(i)).push(i);
    // rare groups on top of frequent ones, selected cells on top of the others
    const order = groups().sort((a, b) => b.size - a.size);
    pen.fillStyle = colourOf("--line");
    for (let i = 0; selected && i < count; i++) if (!selected[i]) mark(pen, "disc", i, map.radius);
    for (const group of order) {
      pen.globalAlpha = group.key < 0 ? 0.5 : 0.85;
      pen.fillStyle = pen.strokeStyle = group.colour;
      for (const i of members.get(group.key)) if (reachable(i)) mark(pen, group.shape, i, map.radius);
    }
    map.ring();
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
    if (found && !selected[map.chosen]) choose(selected.indexOf(1));
    draw();
    return found;
  }

  function choose(i) {
    if (i < 0) return;
    map.chosen = i;
    byId("card-cell").textContent = data.cells[i];
    for (const name of ["cell_type", "guess", "cluster", "novelty", "flag"]) byId(`card-${name}`).textContent = nameOf(name, i);
    const tissue = nameOf("tissue", i), guess = nameOf("tissue_guess", i);
    byId("card-tissue").textContent = guess === tissue ? tissue : `${tissue} (guess: ${guess})`;
    byId("card-bar").style.width = percent(confidence[i]) || 0;
    byId("card-confidence").textContent = percent(confidence[i]) || "none";
    byId("card-guess_confidence").textContent = percent(guessConfidence[i]);
    byId("card-text").textContent = textOf(i);
    map.ring();
  }

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
    map.place();
    draw();
  };
  refresh();
  choose(0);
  new ResizeObserver(() => { map.place(); draw(); }).observe(field);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
})();
