"use strict";
// A map of points on two canvases, for the scripts of the pages: where the points are, which one is under the pointer,
// and which one comes next in the direction of an arrow key. The pages draw the points and show the chosen one.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// field, cursor: canvases of the points and of the ring around the chosen one; x, y: places, up to width and height;
// smallest: radius of points, at least; reachable(i): whether point i can be chosen; choose(i): called with it, or -1
function pointMap({ field, cursor, x, y, width, height, smallest, reachable, choose }) {
  const BOX = 16; // side of a box of the lookup grid, in CSS pixels
  const MARGIN = 22;
  const count = x.length, px = new Float32Array(count), py = new Float32Array(count);
  const map = { px, py, radius: 4, chosen: 0 };
  let boxes = new Map();

  map.prepare = (canvas) => {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    return pen;
  };

  map.place = () => {
    const inside = field.clientWidth - 2 * MARGIN, high = field.clientHeight - 2 * MARGIN;
    const scale = Math.min(inside / width, high / height);
    const left = MARGIN + (inside - width * scale) / 2, top = MARGIN + (high - height * scale) / 2;
    map.radius = Math.max(smallest, Math.min(6, (inside / 10) / Math.sqrt(count)));
    boxes = new Map();
    for (let i = 0; i < count; i++) {
      px[i] = left + x[i] * scale;
      py[i] = top + (height - y[i]) * scale;
      const key = (px[i] / BOX | 0) * 65536 + (py[i] / BOX | 0);
      if (boxes.has(key)) boxes.get(key).push(i);
      else boxes.set(key, [i]);
    }
  };

  map.ring = () => {
    const pen = map.prepare(cursor);
    if (!count) return;
    pen.strokeStyle = colourOf("--ink");
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(px[map.chosen], py[map.chosen], map.radius + 4, 0, 2 * Math.PI);
    pen.stroke();
  };

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
      const right = px[i] - px[map.chosen], down = py[i] - py[map.chosen];
      const along = right * dx + down * dy, across = Math.abs(right * dy - down * dx);
      if (along <= 0 || along < across || !reachable(i)) continue;
      if (along + across < least) { least = along + across; best = i; }
    }
    return best;
  }

  function follow(event) {
    const frame = cursor.getBoundingClientRect();
    choose(nearest(event.clientX - frame.left, event.clientY - frame.top));
  }
  cursor.addEventListener("pointermove", follow);
  cursor.addEventListener("pointerdown", follow);
  cursor.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    choose(neighbour(...ARROWS[event.key]));
  });
  return map;
}
