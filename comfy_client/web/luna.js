// LunaServe's sidebar panel, settings and warnings. All data comes from ComfyUI's own server (/luna/...), which alone
// holds the tokens.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const REFRESH_MS = 2000;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function ask(path, options = {}) {
  const answer = await api.fetchApi(path, options);
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error([told.message ?? answer.statusText, told.hint].filter(Boolean).join(" - "));
  return told;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toLocaleString(undefined, { maximumFractionDigits: 0 })} MB`;
}

// "" while a step is longer than the time that is counted: it is no standstill.
function rate(requestsPerSecond) {
  return requestsPerSecond ? `, ${requestsPerSecond.toFixed(1)} requests/s` : "";
}

function picture(thumbnail, title) {
  return element("img", { src: `data:image/jpeg;base64,${thumbnail}`, title });
}

// One line however long the name; the whole of it is the tooltip.
function shortened(tag, textContent, properties = {}) {
  return element(tag, { textContent, title: textContent, className: "luna-short", ...properties });
}

// The pictures of a job appear on the node that sent it, as they would on a Save Image node.
function showOnNode({ node, thumbnails, files }) {
  const sender = app.graph?.getNodeById(Number(node)) ?? app.graph?.getNodeById(node);
  if (!sender || !thumbnails.length) return;
  const images = thumbnails.map((thumbnail, row) => picture(thumbnail, files[row]));
  Promise.all(images.map((image) => image.decode())).then(() => {
    sender.imgs = images;
    sender.imageIndex = images.length === 1 ? 0 : null;
    sender.setSizeForImage?.();
    app.graph.setDirtyCanvas(true, true);
  });
}

class Panel {
  constructor(root) {
    this.state = element("div", { className: "luna-state" });
    this.models = element("div");
    this.notLoaded = element("div");
    this.queue = element("b");
    this.dead = element("div", { className: "luna-name" });
    this.jobs = element("div", { className: "luna-jobs" });
    this.counters = element("table", { className: "luna-counters" });
    this.message = element("div", { className: "luna-message" });
    this.busy = new Set();
    root.replaceChildren(element("div", { className: "luna-panel" }, this.state, this.message, this.models, this.queue, this.dead, this.jobs, this.counters, this.notLoaded));
    this.root = root;
    this.tick();
  }

  // Rendered before it is attached, so the first look comes before the first question whether anyone still sees it.
  async tick() {
    await this.refresh();
    setTimeout(() => this.root.isConnected && this.tick(), REFRESH_MS);
  }

  async refresh() {
    try {
      this.show(await ask("/luna/status"));
    } catch (error) {
      this.state.textContent = `down: ${error.message}`;
      this.state.className = "luna-state luna-down";
      this.models.replaceChildren();
      this.notLoaded.replaceChildren();
      this.queue.textContent = "";
      this.dead.replaceChildren();
      this.jobs.replaceChildren();
      this.counters.replaceChildren();
    }
  }

  show(status) {
    this.state.textContent = `up: ${status.address}, ${status.busy_workers} busy${rate(status.requests_per_second)}`;
    this.state.className = "luna-state luna-up";
    const cards = (models) => models.map((model) => this.card(model));
    this.models.replaceChildren(...cards(status.models.filter((model) => model.workers.length)));
    this.notLoaded.replaceChildren(...cards(status.models.filter((model) => !model.workers.length)));
    this.queue.textContent = status.queue ? this.queueLine(status.queue) : "";
    this.dead.replaceChildren(...(status.queue?.counts.dead ? this.deadLine(status.queue.counts.dead) : []));
    // The same element each time, as a new one would begin at its top again.
    this.jobs.replaceChildren(...(status.queue?.jobs ?? []).map((job) => this.job(job)));
    this.counters.replaceChildren(
      ...Object.entries(status.counters).map(([name, value]) =>
        element("tr", {}, element("td", { textContent: name }), element("td", { textContent: value.toLocaleString() })),
      ),
    );
  }

  card(model) {
    const workers = model.workers.map((worker) => {
      const load = worker.busy ? `busy${rate(worker.requests_per_second)}` : "idle";
      const where = `${worker.device} ${worker.dtype ?? ""}, ${megabytes(worker.weights_bytes)}, ${worker.requests} requests, ${load}`;
      const told = worker.state === "ready" ? where : `${worker.state}: ${worker.reason}`;
      return element("div", { textContent: told, className: worker.busy ? "luna-up" : "" });
    });
    const buttons = model.role === "repository" ? [] : this.buttons(model);
    const state = workers.length ? [] : [element("span", { textContent: "not loaded", className: "luna-muted" })];
    const name = element("div", { className: "luna-name" }, shortened("b", model.name), ...state, ...buttons);
    return element("div", { className: "luna-model" }, name, ...workers);
  }

  queueLine(queue) {
    const counts = Object.entries(queue.counts).filter(([, count]) => count).map(([state, count]) => `${count} ${state}`);
    const wait = queue.estimated_wait === null ? "" : `, a new job waits ${queue.estimated_wait.toFixed(0)} s`;
    return `decode queue: ${counts.join(", ") || "empty"}, ${queue.throughput.toFixed(1)} jobs/min${wait}`;
  }

  // A button for one job, or for all that are dead.
  jobButton(job, action, title) {
    const press = () => ask(`/luna/jobs/${job}/${action}`, { method: "POST" }).catch((error) => (this.message.textContent = error.message)).then(() => this.refresh());
    return element("button", { textContent: action, title, onclick: press });
  }

  deadLine(count) {
    const button = (action, title) => this.jobButton("dead", action, title);
    return [element("span", { textContent: `all ${count} dead:` }), button("retry", "retry all dead jobs"), button("purge", "forget all dead jobs, and their latents")];
  }

  job(job) {
    const act = (action) => this.jobButton(job.job_id, action, `${action} ${job.job_id}`);
    const buttons = { queued: [act("cancel")], running: [act("cancel")], dead: [act("retry"), act("purge")] }[job.state] ?? [];
    const pictures = job.files.filter((file) => file.thumbnail).map((file) => picture(file.thumbnail, file.path));
    const path = job.files[0]?.path ?? "";
    const name = shortened("span", `${job.state} ${path.split("/").pop()}`, { title: path });
    const reason = job.reason ? [element("div", { textContent: job.reason, title: job.reason, className: "luna-reason" })] : [];
    return element("div", { className: "luna-job" }, element("div", { className: "luna-name" }, name, ...buttons), ...reason, ...pictures);
  }

  buttons(model) {
    if (this.busy.has(model.name)) return [element("span", { textContent: "working ...", className: "luna-muted" })];
    const act = (label, action, body) =>
      element("button", { textContent: label, title: `${action} ${model.name}`, onclick: () => this.change(model.name, action, body) });
    const count = model.workers.length;
    if (!count) return [act("load", "load")];
    const fewer = count > 1 ? [act("-", "scale", { workers: count - 1 })] : [];
    return [...fewer, act("+", "scale", { workers: count + 1 }), act("unload", "unload")];
  }

  async change(name, action, body) {
    this.busy.add(name);
    this.message.textContent = "";
    try {
      await ask(`/luna/models/${encodeURIComponent(name)}/${action}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body ?? {}),
      });
    } catch (error) {
      this.message.textContent = error.message;
    }
    this.busy.delete(name);
    await this.refresh();
  }
}

const STYLE = `
.luna-panel { padding: 0.75rem; display: flex; flex-direction: column; gap: 0.6rem; overflow: auto; font-size: 0.85rem; }
.luna-state { font-weight: bold; }
.luna-up { color: var(--p-green-500, #4a4); }
.luna-down, .luna-message { color: var(--p-red-400, #e66); }
.luna-model { border: 1px solid var(--border-color, #444); border-radius: 6px; padding: 0.5rem; margin-bottom: 0.4rem; }
.luna-name { display: flex; gap: 0.4rem; align-items: center; }
.luna-name button { padding: 0 0.5rem; cursor: pointer; }
.luna-short { flex: 1; min-width: 0; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.luna-jobs { max-height: 14rem; flex-shrink: 0; overflow-y: auto; }
.luna-job { padding: 0.2rem 0; }
.luna-reason { max-height: 3.6em; overflow: hidden; overflow-wrap: anywhere; line-height: 1.2; opacity: 0.8; }
.luna-job img { height: 4rem; margin: 0.2rem 0.2rem 0 0; border-radius: 4px; }
.luna-muted { opacity: 0.6; }
.luna-counters td:last-child { text-align: right; padding-left: 1rem; }
`;

const text = (id, name, defaultValue, tooltip) => ({ id, name, type: "text", defaultValue, tooltip, category: ["Luna", "Server", name] });

app.registerExtension({
  name: "LunaServe",
  settings: [
    text("Luna.Server.Inference", "Inference address", "http://127.0.0.1:8080", "TorchServe's inference address; LUNA_INFERENCE overrides it."),
    text("Luna.Server.Management", "Management address", "http://127.0.0.1:8081", "TorchServe's management address; LUNA_MANAGEMENT overrides it."),
    text("Luna.Server.Metrics", "Metrics address", "http://127.0.0.1:8082", "TorchServe's metrics address; LUNA_METRICS overrides it."),
    text("Luna.Server.TokenFile", "Token file", "", "Path of the server's key_file.json as ComfyUI's own machine sees it; LUNA_TOKEN_FILE overrides it."),
  ],
  // As on ComfyUI's own Save Image: %date:yyyy-MM-dd% and %Node title.widget% are filled in as the workflow is sent.
  nodeCreated(node) {
    if (node.comfyClass !== "LunaMultiSaver") return;
    for (const widget of node.widgets.filter(({ name }) => /^(save_path|filename|affix_\d)$/.test(name))) {
      widget.serializeValue = () => window.comfyAPI?.utils?.applyTextReplacements?.(app, widget.value) ?? widget.value;
    }
  },
  async setup() {
    document.head.append(element("style", { textContent: STYLE }));
    app.extensionManager.registerSidebarTab({
      id: "luna",
      icon: "pi pi-moon",
      title: "Luna",
      tooltip: "LunaServe: models, memory and load",
      type: "custom",
      render: (root) => new Panel(root),
    });
    api.addEventListener("luna.warning", ({ detail }) =>
      app.extensionManager.toast.add({ severity: "warn", summary: "LunaServe", detail: detail.message, life: 10000 }),
    );
    api.addEventListener("luna.saved", ({ detail }) => showOnNode(detail));
  },
});
