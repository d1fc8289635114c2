// The page: data comes from server-sent events, or from DATA in a file. What a robot sent is text, never markup.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const SHAPES = new Set(["svg", "polyline", "rect", "line", "circle", "text"]);

function element(name, attributes, ...children) {
  const e = SHAPES.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) e.setAttribute(key, value);
  }
  e.append(...children);
  return e;
}

const number = (x) => (x === null || x === undefined ? "–" : Math.abs(x) >= 1000 ? x.toFixed(0) : x.toPrecision(4));

// Children are changed in place where their number stays, so that focus and selection stay too.
function fill(parent, items, make, change) {
  while (parent.children.length > items.length) parent.lastChild.remove();
  items.forEach((item, i) => {
    if (i >= parent.children.length) parent.append(make(item, i));
    change(parent.children[i], item, i);
  });
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function path(points, x, y) {
  return points.map((p) => x(p[0]).toFixed(1) + "," + y(p[1]).toFixed(1)).join(" ");
}

// ---- pictures ----

function showPictures(cameras, src) {
  fill($("pictures"), cameras,
    () => element("figure", null, element("img", { alt: "" }), element("div", { class: "masked" }, element("span")), element("figcaption")),
    (figure, camera, i) => {
      const [img, masked, caption] = figure.children;
      const url = src ? src[i] : null;
      setText(caption, camera.name);
      const show = !camera.masked && Boolean(url || img.getAttribute("src"));
      img.hidden = !show;
      masked.hidden = show;
      setText(masked.firstChild, camera.masked ? "masked: the policy does not look here" : "waiting for the next picture");
      if (camera.masked) img.removeAttribute("src");
      else if (url && img.getAttribute("src") !== url) {
        img.setAttribute("src", url);
        img.alt = "What the network gets from camera " + camera.name;
      }
    });
}

// ---- state ----

function showState(state) {
  fill($("state"), state,
    () => {
      const bar = element("svg", { viewBox: "0 0 200 16", role: "img" }, element("rect", { class: "band", x: 50, y: 3, width: 100, height: 10 }),
        element("circle", { class: "mark", cy: 8, r: 5 }));
      return element("tr", null, element("th", { scope: "row" }), element("td", { class: "n" }), element("td", { class: "n" }),
        element("td", { class: "n" }), element("td", null, bar));
    },
    (row, value) => {
      const cells = row.children;
      setText(cells[0], value.name);
      setText(cells[1], number(value.raw));
      setText(cells[2], number(value.trained));
      setText(cells[3], number(value.normalized));
      const bar = cells[4].firstChild, mark = bar.lastChild;
      bar.toggleAttribute("hidden", !value.range);
      if (!value.range) return;
      const [low, high] = value.range;
      const at = (value.trained - low) / Math.max(high - low, 1e-9);
      const x = Math.min(195, Math.max(5, 50 + 100 * at));
      mark.setAttribute("cx", x.toFixed(1));
      mark.setAttribute("class", at < -0.5 || at > 1.5 ? "mark out" : "mark");
      bar.setAttribute("aria-label", Math.round(100 * at) + " % of the range " + number(low) + " to " + number(high));
    });
}

// ---- chunk ----

function showChunk(chunk) {
  const box = $("chunk");
  if (!chunk) {
    box.replaceChildren();
    return setText($("executed"), "No answer yet.");
  }
  setText($("executed"), !chunk.previous.length ? "The first chunk."
    : chunk.executed === null ? "How much of the chunk before was executed is not known."
      : "Executed of the chunk before: " + chunk.executed + " of " + chunk.previous.length + " actions.");
  fill(box, chunk.names,
    () => element("figure", null, element("figcaption"), element("svg", { viewBox: "0 0 260 100", role: "img" })),
    (figure, name, d) => {
      setText(figure.firstChild, name);
      const svg = figure.lastChild;
      const now = chunk.actions.map((row, t) => [t, row[d]]);
      const shift = chunk.executed === null ? chunk.previous.length : chunk.executed;
      const old = chunk.previous.map((row, t) => [t - shift, row[d]]);
      const state = chunk.state[d], range = chunk.range[d];
      const values = now.concat(old).map((p) => p[1]).concat(state === null ? [] : [state]);
      let low = Math.min(...values), high = Math.max(...values);
      const room = Math.max(0.05 * (high - low), 1e-6 * Math.max(Math.abs(low), Math.abs(high)), 1e-9);
      [low, high] = [low - room, high + room];
      const first = old.length ? old[0][0] : 0, last = Math.max(now.length - 1, 1);
      const x = (t) => 52 + (t - first) / (last - first) * 202;
      const y = (v) => 90 - (Math.min(high, Math.max(low, v)) - low) / (high - low) * 80;
      const parts = [];
      if (range) {
        const top = y(range[1]), bottom = y(range[0]);
        parts.push(element("rect", { class: "band", x: 52, width: 202, y: top.toFixed(1), height: Math.max(0, bottom - top).toFixed(1) }));
      }
      parts.push(element("line", { class: "axis", x1: x(0), x2: x(0), y1: 8, y2: 92 }));
      parts.push(element("text", { x: 49, y: 14, "text-anchor": "end" }, number(high)));
      parts.push(element("text", { x: 49, y: 94, "text-anchor": "end" }, number(low)));
      if (old.length) {
        parts.push(element("polyline", { class: "line old-line", points: path(old, x, y) }));
        if (chunk.executed) parts.push(element("polyline", { class: "line done-line", points: path(old.slice(0, chunk.executed), x, y) }));
      }
      parts.push(element("polyline", { class: "line new", points: path(now, x, y) }));
      if (state !== null) parts.push(element("circle", { class: "now-dot", cx: x(0), cy: y(state), r: 4 }));
      svg.replaceChildren(...parts);
      const ends = now.length ? number(now[0][1]) + " to " + number(now[now.length - 1][1]) : "nothing";
      svg.setAttribute("aria-label", name + ": from " + ends + " over " + now.length + " actions");
    });
}

// ---- findings ----

function showFindings(findings) {
  $("healthy").hidden = findings.length > 0;
  fill($("findings"), findings,
    () => element("li", null, element("code"), " ", element("span"), element("small")),
    (li, f) => {
      const [kind, text, small] = li.children;
      setText(kind, f.kind);
      setText(text, f.text + ".");
      const since = f.count > 1 ? f.count + " times since request " + f.since + ", " + Math.round(f.for_seconds) + " s ago. " : "";
      setText(small, since + "To do: " + f.remedy + ".");
    });
}

// ---- everything about one request ----

function showView(view, src) {
  for (const id of ["findings", "pictures", "prompt", "state", "chunk"]) $(id).closest("section").hidden = !view;
  if (!view) return;
  showFindings(view.findings);
  showPictures(view.pictures, src);
  setText($("prompt"), view.prompt);
  setText($("tokens"), view.tokens[0] + " of " + view.tokens[1] + " tokens");
  showChunk(view.chunk);
  showState(view.state);
}

// ---- server ----

function showRobots(all, chosen) {
  $("nobody").hidden = all.length > 0;
  fill($("robots"), all,
    () => {
      const input = element("input", { type: "radio", name: "robot" });
      input.addEventListener("change", () => choose(Number(input.value)));
      return element("label", null, input, element("span"), element("small"));
    },
    (label, robot) => {
      const [input, name, small] = label.children;
      input.value = robot.id;
      input.checked = robot.id === chosen;
      setText(name, "Robot " + robot.id + ", " + robot.peer);
      const warned = robot.warnings ? ", " + robot.warnings + (robot.warnings === 1 ? " warning" : " warnings") : "";
      setText(small, robot.rate.toFixed(1) + " requests a second, " + robot.requests + " in all" + warned);
    });
}

function showLatency(data) {
  const view = data.view, stages = data.stages;
  const total = (i) => {
    const n = data.latency.reduce((sum, b) => sum + b.count, 0);
    return n ? data.latency.reduce((sum, b) => sum + b.count * b.ms[i], 0) / n : null;
  };
  fill($("times"), stages,
    () => element("tr", null, element("th", { scope: "row" }), element("td", { class: "n" }), element("td", { class: "n" })),
    (row, stage, i) => {
      setText(row.children[0], stage);
      const last = view && view.times.find((t) => t[0] === stage);
      setText(row.children[1], last ? last[1].toFixed(2) + " ms" : "–");
      const mean = total(i);
      setText(row.children[2], mean === null ? "–" : mean.toFixed(2) + " ms");
    });
  const box = $("latency");
  if (!box.firstChild) box.append(element("svg", { viewBox: "0 0 720 150", role: "img" }));
  const high = Math.max(1e-3, ...data.latency.flatMap((b) => b.ms));
  const x = (ago) => 710 - ago / 300 * 650, y = (ms) => 128 - ms / high * 110;
  const parts = [element("text", { x: 54, y: 20, "text-anchor": "end" }, high.toPrecision(3) + " ms"),
    element("text", { x: 54, y: 132, "text-anchor": "end" }, "0"),
    element("text", { x: 60, y: 146 }, "5 minutes ago"), element("text", { x: 710, y: 146, "text-anchor": "end" }, "now")];
  stages.forEach((stage, i) => {
    const points = data.latency.map((b) => [b.ago, b.ms[i]]);
    // A line of one point is a dot.
    if (points.length === 1) points.push(points[0]);
    parts.push(element("polyline", { class: "line s" + i, points: path(points, x, y) }));
    parts.push(element("text", { x: 180 + 90 * i, y: 146 }, stage));
    parts.push(element("line", { class: "line s" + i, x1: 164 + 90 * i, x2: 176 + 90 * i, y1: 142, y2: 142 }));
  });
  box.firstChild.replaceChildren(...parts);
  const mean = total(stages.length - 1);
  box.firstChild.setAttribute("aria-label", "Latency by stage over five minutes; total on average " + (mean === null ? "unknown" : mean.toFixed(1) + " ms"));
}

function showServer(data) {
  const failed = Object.entries(data.outcomes).filter(([name, n]) => name !== "ok" && n > 0);
  const rows = [["requests served", String(data.outcomes.ok)],
    ["failed", failed.length ? failed.map(([name, n]) => n + " " + name).join(", ") : "none"],
    ["waiting", data.queue + " of at most " + data.max_queue], ["robots", String(data.connected)],
    ["running for", data.uptime < 120 ? data.uptime + " s" : Math.floor(data.uptime / 60) + " min"]];
  const cells = rows.flat();
  const list = $("server");
  if (list.children.length !== cells.length) {
    list.replaceChildren(...cells.map((_, i) => element(i % 2 ? "dd" : "dt")));
  }
  cells.forEach((text, i) => setText(list.children[i], text));
  const errors = data.errors.map((e) => Math.round(e.ago) + " s ago, " + e.peer + ", " + e.kind + ": " + e.text);
  fill($("errors"), errors.length ? errors : ["none"], () => element("li"), setText);
}

// ---- live ----

let wanted = null, stream = null, updates = 0, pictureOf = null;

// Read aloud whenever it changes; the number of the request, which changes all the time, is not.
function status(text, bad, request) {
  setText($("status"), text);
  setText($("request"), request ? ", request " + request : "");
  $("status").className = bad ? "bad" : "";
}

function choose(robot) {
  wanted = robot;
  if (stream) stream.abort();
}

function showDoor(text) {
  $("door").hidden = false;
  $("main").hidden = true;
  setText($("refusal"), text);
  $("key").focus();
}

function receive(name, data) {
  if (name === "pictures") {
    if (pictureOf === data.robot) document.querySelectorAll("#pictures figure").forEach((figure, i) => {
      const url = data.src[i], img = figure.firstChild;
      if (url) {
        img.setAttribute("src", url);
        img.alt = "What the network gets from camera " + figure.lastChild.textContent;
        img.hidden = false;
        figure.children[1].hidden = true;
      }
    });
    return;
  }
  if (pictureOf !== data.robot) {
    pictureOf = data.robot;
    $("pictures").replaceChildren();
  }
  $("main").hidden = false;
  showRobots(data.robots, data.robot);
  showView(data.view, null);
  showLatency(data);
  showServer(data);
  updates += 1;
  document.body.dataset.updates = updates;
  status(data.view ? "live" : "live, no robot yet", false, data.view && data.view.request);
}

// EventSource cannot send a key, so events are read by hand.
async function listen() {
  const key = sessionStorage.getItem("pi0-key");
  stream = new AbortController();
  const query = wanted === null ? "" : "?robot=" + wanted;
  const response = await fetch("live" + query, {
    headers: key ? { Authorization: "Api-Key " + key } : {}, signal: stream.signal, cache: "no-store",
  });
  if (response.status === 401) {
    sessionStorage.removeItem("pi0-key");
    showDoor(key ? "This key is not accepted." : "This server wants an API key.");
    status("not allowed", true);
    return false;
  }
  if (!response.ok) throw new Error(await response.text());
  $("door").hidden = true;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the stream");
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const lines = rest.slice(0, end).split("\n");
      const field = (name) => (lines.find((line) => line.startsWith(name + ": ")) || "").slice(name.length + 2);
      receive(field("event"), JSON.parse(field("data")));
    }
  }
}

async function live() {
  for (let pause = 250; ;) {
    const before = updates;
    try {
      if (!(await listen())) return;
    } catch (error) {
      if (error.name === "AbortError") continue;
      if (updates > before) [pause, pictureOf] = [250, null];
      status("connection lost, trying again: " + error.message, true);
      await new Promise((done) => setTimeout(done, pause));
      pause = Math.min(2 * pause, 4000);
    }
  }
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("pi0-key", $("key").value);
  $("key").value = "";
  live();
});

// ---- a file ----

function replay() {
  $("main").hidden = false;
  for (const id of ["robots-section", "server-section"]) $(id).hidden = true;
  $("latency").hidden = true;
  setText($("title"), DATA.title);
  const views = DATA.views, slider = $("step");
  slider.max = Math.max(0, views.length - 1);
  $("steps").hidden = views.length < 2;
  const show = () => {
    const i = Number(slider.value), view = views[i];
    $("pictures").replaceChildren();
    showView(view, view ? view.pictures.map((p) => p.src) : null);
    if (!view) return status("nothing to show", true);
    document.querySelectorAll("#pictures .masked span").forEach((span, at) => {
      if (!view.pictures[at].masked) setText(span, "this picture is not in the file");
    });
    fill($("times"), view.times,
      () => element("tr", null, element("th", { scope: "row" }), element("td", { class: "n" }), element("td", { class: "n" })),
      (row, time) => {
        setText(row.children[0], time[0]);
        setText(row.children[1], time[1].toFixed(2) + " ms");
        setText(row.children[2], "–");
      });
    setText($("place"), i + 1 + " of " + views.length);
    status(view.title, false);
  };
  slider.addEventListener("input", show);
  const move = (by) => () => {
    slider.value = Number(slider.value) + by;
    show();
  };
  $("back").addEventListener("click", move(-1));
  $("forward").addEventListener("click", move(1));
  show();
}

if (DATA) replay();
else live();
