"use strict";

const element = (id) => document.getElementById(id);
const shown = { job: null, source: null, viewer: null, previews: 0 };

async function call(method, path, body) {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const text = await answer.text();
  const found = text ? JSON.parse(text) : null;
  if (!answer.ok) throw new Error((found && (found.detail || (found.error && found.error.message))) || `${answer.status} ${answer.statusText}`);
  return found;
}

function complain(error) {
  element("error").textContent = error ? error.message || String(error) : "";
}

function show(...ids) {
  for (const id of ["planned", "working", "finished", "empty"]) element(id).hidden = !ids.includes(id);
}

function readPicture(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function task() {
  const found = {
    kind: "render",
    prompt: element("prompt").value,
    negative: element("negative").value,
    size: `${element("width").value}x${element("height").value}`,
    model: element("model").value,
    preset: element("preset").value,
    format: element("format").value,
  };
  if (element("vram").value.trim()) found.vram = element("vram").value.trim();
  if (element("steps").value) found.steps = Number(element("steps").value);
  if (element("seed").value) found.seed = Number(element("seed").value);
  const file = element("init").files[0];
  if (file) {
    found.init = await readPicture(file);
    found.strength = Number(element("strength").value);
  }
  return found;
}

async function guarded(button, work) {
  complain(null);
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    button.disabled = false;
  }
}

function drawPlan(made) {
  element("drawing").src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(made.svg);
  element("explained").textContent = made.text;
}

element("plan").addEventListener("click", () => guarded(element("plan"), async () => {
  if (!element("form").reportValidity()) return;
  drawPlan(await call("POST", "/plan", await task()));
  unwatch();
  show("planned");
}));

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(element("render"), async () => {
    const wanted = await task();
    const job = await call("POST", "/jobs", wanted);
    watch(job);
    listJobs();
  });
});

element("shape").addEventListener("change", () => {
  const [width, height] = element("shape").value.split("x");
  if (height) {
    element("width").value = width;
    element("height").value = height;
  }
});

element("cancel").addEventListener("click", () => guarded(element("cancel"), async () => {
  if (shown.job) await call("POST", `/jobs/${shown.job}/cancel`);
}));

function unwatch() {
  if (shown.source) shown.source.close();
  shown.source = null;
  shown.job = null;
}

function watch(job) {
  unwatch();
  shown.job = job.id;
  shown.previews = 0;
  element("preview").hidden = true;
  element("bar").value = 0;
  element("status").textContent = "waiting";
  show("working");
  const source = new EventSource(`/jobs/${job.id}/events`);
  shown.source = source;
  source.addEventListener("progress", (event) => progress(JSON.parse(event.data)));
  source.addEventListener("end", (event) => {
    source.close();
    end(JSON.parse(event.data));
    listJobs();
  });
}

function progress(job) {
  if (job.id !== shown.job) return;
  const now = job.progress;
  element("bar").value = now.fraction;
  const percent = `${(100 * now.fraction).toFixed(1)} %`;
  const step = now.steps ? `, step ${now.step} of ${now.steps}` : "";
  const left = now.eta_seconds === null ? "" : `, about ${duration(now.eta_seconds)} left`;
  element("status").textContent = job.status === "queued"
    ? `waiting, ${job.position} came before it`
    : `${percent}: ${now.stage}, ${now.done} of ${now.total}${step}${left}, memory ${(now.peak_bytes / 2 ** 30).toFixed(2)} GiB`;
  if (now.previews > shown.previews) {
    shown.previews = now.previews;
    element("preview").src = `/jobs/${job.id}/preview?${now.previews}`;
    element("preview").hidden = false;
  }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function end(job) {
  if (job.id !== shown.job) return;
  if (job.status === "done") {
    finished(job);
    return;
  }
  show("empty");
  if (job.status === "failed") complain(new Error(job.error));
  element("empty").textContent = job.status === "cancelled" ? "Cancelled." : "The job ended without a picture.";
}

async function finished(job) {
  const result = job.results[0];
  show("finished");
  const megabytes = (result.bytes / 1e6).toFixed(1);
  element("facts").textContent = `${result.size}, seed ${result.seed}, ${result.seconds.toFixed(1)} s, ${megabytes} MB`;
  element("download").href = result.url;
  element("download").download = `hires-${job.id.slice(0, 8)}${result.file.slice(result.file.lastIndexOf("."))}`;
  try {
    const facts = await call("GET", `/jobs/${job.id}/zoom`);
    if (shown.viewer) shown.viewer.destroy();
    shown.viewer = OpenSeadragon({
      id: "viewer",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "BOTTOM_RIGHT",
      maxZoomPixelRatio: 8,
      imageSmoothingEnabled: true,
      immediateRender: true,
      tileSources: {
        width: facts.width,
        height: facts.height,
        tileSize: facts.tile,
        minLevel: 0,
        maxLevel: facts.max_level,
        getTileUrl: (level, x, y) => `/jobs/${job.id}/zoom/0/${level}/${x}_${y}.jpg`,
      },
    });
  } catch (error) {
    complain(error);
  }
}

element("fit").addEventListener("click", () => shown.viewer && shown.viewer.viewport.goHome());
element("whole").addEventListener("click", () => {
  const viewport = shown.viewer && shown.viewer.viewport;
  if (viewport) viewport.zoomTo(viewport.imageToViewportZoom(1 / window.devicePixelRatio));
});

async function listJobs() {
  const list = element("jobs");
  const jobs = (await call("GET", "/jobs")).slice(0, 12);
  list.replaceChildren(...jobs.map((job) => {
    const button = document.createElement("button");
    button.type = "button";
    for (const [text, name] of [[job.prompt || job.kind, ""], [job.status, "status"]]) {
      const part = document.createElement("span");
      part.textContent = text;
      part.className = name;
      button.append(part);
    }
    button.addEventListener("click", () => {
      complain(null);
      watch(job);
    });
    return button;
  }));
}

async function begin() {
  const [health, offered] = await Promise.all([call("GET", "/health"), call("GET", "/models")]);
  element("device").textContent = `${health.version} on ${health.devices.join(", ")}${health.vram ? `, ${health.vram}` : ""}`;
  element("model").replaceChildren(...offered.models.map((name) => new Option(name, name)));
  await listJobs();
}

begin().catch(complain);
