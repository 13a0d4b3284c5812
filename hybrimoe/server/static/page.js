"use strict";
// Chat on the left through /v1/chat/completions, snapshots on the right through /live/stream. No library, nothing from
// elsewhere; what people and the model write reaches the page as text only.

const $ = (id) => document.getElementById(id);
const N_HISTORY = 120;
let apiKey = sessionStorage.getItem("hybrimoe-key") || "";
let messages = [];
let running = null;
let history = [];
let latest = null;

const headers = (more = {}) => (apiKey ? { ...more, Authorization: `Bearer ${apiKey}` } : more);
const number = (x, digits = 1) => (x === null || x === undefined || x === 0 ? "-" : x >= 100 ? x.toFixed(0) : x.toFixed(digits));
const percent = (x) => (x === null || x === undefined ? "-" : `${Math.round(100 * x)} %`);

function size(n) {
  for (const [unit, factor] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (n >= factor) return `${(n / factor).toFixed(n / factor < 100 ? 1 : 0)} ${unit}`;
  return `${Math.round(n)} B`;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Server-sent events of a response, as parsed objects, until it ends.
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += decoder.decode(value, { stream: true });
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice(6);
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function failureOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

// Chat

function addMessage(role, text) {
  document.querySelector(".empty")?.remove();
  const box = element("div", `message ${role}`);
  box.append(element("span", "", text));
  $("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  addMessage("user", text);
  const box = addMessage("assistant", "");
  box.classList.add("busy");
  running = new AbortController();
  showRunning(true);
  let answer = "";
  let timings = null;
  let failure = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify({ messages, stream: true }),
      signal: running.signal,
    });
    if (response.status === 401) askForKey();
    if (!response.ok) throw new Error(await failureOf(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      timings = chunk.timings || timings;
      const piece = chunk.choices[0]?.delta?.content;
      if (!piece) continue;
      answer += piece;
      const view = $("messages");
      const follows = view.scrollHeight - view.scrollTop - view.clientHeight < 80;
      box.firstChild.textContent = answer;
      if (follows) view.scrollTop = view.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") failure = error.message;
  }
  box.classList.remove("busy");
  running = null;
  showRunning(false);
  if (answer) messages.push({ role: "assistant", content: answer });
  else messages.pop();
  if (!answer && !failure) box.remove();
  if (failure && !answer) box.remove();
  if (failure) addMessage("error", failure);
  if (timings && answer) box.append(element("small", "", footer(timings)));
}

function footer(t) {
  const parts = [`prompt ${number(t.prompt_per_second)} t/s`, `generated ${number(t.predicted_per_second)} t/s`];
  const queries = t.experts.hits + t.experts.misses;
  const all = t.experts.cpu + t.experts.gpu;
  if (queries) parts.push(`${percent(t.experts.hits / queries)} hits`, `${percent(t.experts.gpu / all)} on the GPU`, `${size(t.experts.h2d_bytes)} moved`);
  return parts.join(" · ");
}

function showRunning(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

function send() {
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  ask(text);
}

// Live view

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

function setPhase(phase) {
  const names = { idle: "idle", prompt: "reading the prompt", generating: "answering", loading: "loading the model", lost: "no connection" };
  $("phase").dataset.phase = phase;
  $("phase").textContent = names[phase] || phase;
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/live/stream", { headers: headers(), cache: "no-store" });
      if (response.status === 401) {
        askForKey();
        return;
      }
      if (!response.ok) throw new Error(String(response.status));
      for await (const snapshot of events(response)) show(snapshot);
    } catch {
      // shown below
    }
    setPhase("lost");
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function show(s) {
  latest = s;
  setPhase(s.phase);
  const name = s.model.name || s.command;
  $("model").textContent = name;
  document.title = `${name} - HybriMoE`;
  document.body.classList.toggle("companion", s.companion === true);
  if (s.requests) $("queue").textContent = `${s.requests.running} / ${s.requests.waiting}`;
  if (s.phase === "loading") return;
  $("shape").textContent = `${s.model.n_moe_layers} MoE layers × ${s.model.n_experts} experts, top-${s.model.top_k}${s.model.file_type ? `, ${s.model.file_type}` : ""}`;
  const rates = s.rates || {};
  $("generation").textContent = number(rates.generation_per_s || s.totals.generation_per_s);
  $("prompt").textContent = number(rates.prompt_per_s || s.totals.prompt_per_s);
  const hasCache = s.devices.length > 0;
  $("hits").textContent = hasCache ? percent(rates.hit_rate ?? s.totals.hit_rate) : "-";
  $("hits-label").textContent = hasCache ? "hit rate" : "no cache";
  showSplit(s);
  showBusy(s);
  history.push(rates.generation_per_s || 0);
  if (history.length > N_HISTORY) history.shift();
  drawHistory();
  drawHeat(s);
  showDevices(s);
  $("events-section").hidden = s.events.length === 0;
  $("events").replaceChildren(...s.events.slice(-6).map((e) => element("li", "", e.text)));
}

function showSplit(s) {
  const all = s.totals.experts_cpu + s.totals.experts_gpu;
  if (!all) return;
  const gpu = s.rates && s.rates.gpu_share !== null ? s.rates.gpu_share : s.totals.gpu_share;
  $("split-cpu").style.width = `${100 * (1 - gpu)}%`;
  $("split-gpu").style.width = `${100 * gpu}%`;
  $("split-text").textContent = s.devices.length
    ? `CPU ${percent(1 - gpu)}, GPU ${percent(gpu)} of the experts; ${size(s.totals.h2d_bytes)} moved so far`
    : "CPU 100 %: no accelerator takes part";
}

function showBusy(s) {
  const busy = (s.rates && s.rates.busy) || {};
  const rows = [["CPU in experts", busy.cpu, "--cpu"]];
  if (s.devices.length)
    rows.push(["GPU in experts (est.)", busy.gpu, "--gpu"], ["Link", busy.link, "--link"], ["Waiting for the GPU", busy.wait, "--wait"]);
  const parts = [];
  for (const [name, share, color] of rows) {
    const bar = element("dd", "bar");
    const fill = element("i");
    fill.style.width = `${100 * (share || 0)}%`;
    fill.style.background = `var(${color})`;
    bar.append(fill);
    parts.push(element("dt", "", name), bar, element("dd", "", percent(share)));
  }
  $("busy").replaceChildren(...parts);
}

function showDevices(s) {
  $("devices-section").hidden = s.devices.length === 0;
  const parts = [];
  for (const d of s.devices) {
    const used = d.total_bytes ? 1 - d.free_bytes / d.total_bytes : 0;
    const bar = element("dd", "bar");
    const fill = element("i");
    fill.style.width = `${100 * used}%`;
    fill.style.background = "var(--gpu)";
    bar.append(fill);
    const text = `${d.n_slots} slots, ${size(d.cache_bytes)}; ${size(d.free_bytes)} free${d.suspended ? "; suspended" : ""}`;
    parts.push(element("dt", "", d.name), bar, element("dd", "", text));
  }
  $("devices").replaceChildren(...parts);
  const g = s.guard;
  const fixed = s.reproducible;
  $("guard").textContent = !g
    ? ""
    : fixed && fixed.on
    ? `reproducible: ${fixed.holds ? "yes" : "no longer"}`
    : `guard ${g.on ? g.level : "off"}` + (g.token_us ? `: MoE ${(g.token_us / 1e3).toFixed(1)} ms a token, plain placement ${(g.floor_us / 1e3).toFixed(1)} ms` : "");
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A canvas with as many device pixels as it covers; gives its context in CSS pixels.
function canvas(id, height) {
  const c = $(id);
  const scale = window.devicePixelRatio || 1;
  const width = c.clientWidth;
  c.style.height = `${height}px`;
  if (c.width !== Math.round(width * scale) || c.height !== Math.round(height * scale)) {
    c.width = Math.round(width * scale);
    c.height = Math.round(height * scale);
  }
  const g = c.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  return [g, width];
}

function drawHistory() {
  const [g, width] = canvas("history", 44);
  const most = Math.max(1, ...history);
  const step = width / (N_HISTORY - 1);
  const x = (i) => width - (history.length - 1 - i) * step;
  const y = (v) => 42 - (34 * v) / most;
  g.beginPath();
  history.forEach((v, i) => (i ? g.lineTo(x(i), y(v)) : g.moveTo(x(i), y(v))));
  g.strokeStyle = color("--accent");
  g.lineWidth = 1.5;
  g.stroke();
  g.lineTo(x(history.length - 1), 44);
  g.lineTo(x(0), 44);
  g.globalAlpha = 0.15;
  g.fillStyle = color("--accent");
  g.fill();
  g.globalAlpha = 1;
  g.fillStyle = color("--soft");
  g.font = "11px system-ui, sans-serif";
  g.fillText(`${number(most)} t/s`, 2, 11);
}

// Anchors of a scale that gets both lighter and redder, for eyes that see no hue and for paper.
const STOPS_DARK = [[35, 42, 56], [33, 79, 128], [38, 140, 150], [120, 190, 90], [245, 200, 70], [255, 240, 190]];
const STOPS_LIGHT = [[233, 235, 240], [170, 205, 235], [90, 165, 205], [60, 125, 150], [190, 110, 20], [130, 30, 10]];

function heatColor(warm) {
  const stops = matchMedia("(prefers-color-scheme: dark)").matches ? STOPS_DARK : STOPS_LIGHT;
  const at = Math.min(0.999, Math.sqrt(warm / 4)) * (stops.length - 1);
  const i = Math.floor(at);
  const mix = stops[i].map((v, k) => Math.round(v + (at - i) * (stops[i + 1][k] - v)));
  return `rgb(${mix.join(",")})`;
}

function heatShape(s) {
  const n = Math.max(...s.experts.layers.map((_, i) => (s.experts.heat ? s.experts.heat[i] : s.experts.on[i]).length), 1);
  const cell = Math.max(4, Math.min(14, Math.floor(300 / s.experts.layers.length)));
  return [n, cell];
}

function drawHeat(s) {
  const { layers, heat, on } = s.experts;
  if (!layers.length) return;
  const [n, cell] = heatShape(s);
  const [g, width] = canvas("heat", layers.length * cell);
  const w = width / n;
  let anyHeld = false;
  for (let r = 0; r < layers.length; r++) {
    for (let e = 0; e < n; e++) {
      g.fillStyle = heatColor(heat ? heat[r][e] * n : 0);
      g.fillRect(e * w, r * cell, Math.max(w - 1, w * 0.8), cell - 1);
      if (on[r].length && on[r][e] >= 0) {
        anyHeld = true;
        g.strokeStyle = color("--text");
        g.lineWidth = Math.min(1.5, w / 4);
        g.strokeRect(e * w + 0.75, r * cell + 0.75, Math.max(w - 2.5, 1), cell - 2.5);
      }
    }
  }
  $("held-legend").hidden = !anyHeld;
  $("scale").style.background = `linear-gradient(90deg, ${[0, 0.2, 0.6, 1.2, 2.2, 4].map(heatColor).join(",")})`;
}

function hover(event) {
  if (!latest || !latest.experts) return;
  const { layers, heat, on } = latest.experts;
  const [n, cell] = heatShape(latest);
  const box = $("heat").getBoundingClientRect();
  const r = Math.floor((event.clientY - box.top) / cell);
  const e = Math.floor(((event.clientX - box.left) / box.width) * n);
  if (!(r >= 0 && r < layers.length && e >= 0 && e < n)) return;
  const share = heat ? `${(heat[r][e] * n).toFixed(1)} × average` : "";
  const device = on[r].length && on[r][e] >= 0 ? `, on ${latest.devices[on[r][e]].name}` : "";
  $("heat-hover").textContent = `layer ${layers[r]}, expert ${e}: ${share}${device}`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("messages").replaceChildren();
  $("text").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value.trim();
  sessionStorage.setItem("hybrimoe-key", apiKey);
  $("key-form").hidden = true;
  watch();
});
$("heat").addEventListener("mousemove", hover);
$("heat").addEventListener("mouseleave", () => ($("heat-hover").textContent = ""));
window.addEventListener("resize", () => latest && latest.experts && (drawHistory(), drawHeat(latest)));
$("text").focus();
watch();
