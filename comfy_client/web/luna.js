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

function picture(thumbnail, title) {
  return element("img", { src: `data:image/jpeg;base64,${thumbnail}`, title });
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
    this.queue = element("div", { className: "luna-queue" });
    this.counters = element("table", { className: "luna-counters" });
    this.message = element("div", { className: "luna-message" });
    this.busy = new Set();
    root.replaceChildren(element("div", { className: "luna-panel" }, this.state, this.models, this.queue, this.counters, this.message));
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
      this.queue.replaceChildren();
      this.counters.replaceChildren();
    }
  }

  show(status) {
    this.state.textContent = `up: ${status.address}, ${status.requests_per_second.toFixed(1)} requests/s`;
    this.state.className = "luna-state luna-up";
    this.models.replaceChildren(...status.models.map((model) => this.card(model)));
    this.queue.replaceChildren(...(status.queue ? this.jobs(status.queue) : []));
    this.counters.replaceChildren(
      ...Object.entries(status.counters).map(([name, value]) =>
        element("tr", {}, element("td", { textContent: name }), element("td", { textContent: value.toLocaleString() })),
      ),
    );
  }

  card(model) {
    const workers = model.workers.map((worker) => {
      const where = `${worker.device} ${worker.dtype ?? ""}, ${megabytes(worker.weights_bytes)}, ${worker.requests} requests`;
      return element("div", { textContent: worker.state === "ready" ? where : `${worker.state}: ${worker.reason}` });
    });
    const buttons = model.role === "repository" ? [] : this.buttons(model);
    return element(
      "div",
      { className: "luna-model" },
      element("div", { className: "luna-name" }, element("b", { textContent: model.name }), ...buttons),
      ...(workers.length ? workers : [element("div", { textContent: "not loaded", className: "luna-muted" })]),
    );
  }

  jobs(queue) {
    const counts = Object.entries(queue.counts).map(([state, count]) => `${count} ${state}`);
    const wait = queue.estimated_wait === null ? "" : `, a new job waits ${queue.estimated_wait.toFixed(0)} s`;
    const head = `decode queue: ${counts.join(", ") || "empty"}, ${queue.throughput.toFixed(1)} jobs/min${wait}`;
    return [element("b", { textContent: head }), ...queue.jobs.map((job) => this.job(job))];
  }

  job(job) {
    const act = (action) =>
      element("button", {
        textContent: action,
        onclick: () => ask(`/luna/jobs/${job.job_id}/${action}`, { method: "POST" }).catch((error) => (this.message.textContent = error.message)).then(() => this.refresh()),
      });
    const buttons = { queued: [act("cancel")], running: [act("cancel")], dead: [act("retry")] }[job.state] ?? [];
    const pictures = job.files.filter((file) => file.thumbnail).map((file) => picture(file.thumbnail, file.path));
    const told = `${job.state} ${job.files[0]?.path ?? ""}${job.reason ? `: ${job.reason}` : ""}`;
    return element("div", { className: "luna-job" }, element("div", { className: "luna-name" }, element("span", { textContent: told }), ...buttons), ...pictures);
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
.luna-name { display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: center; }
.luna-name b { flex: 1; }
.luna-name button { padding: 0 0.5rem; cursor: pointer; }
.luna-job { padding: 0.2rem 0; }
.luna-job span { flex: 1; overflow-wrap: anywhere; }
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
