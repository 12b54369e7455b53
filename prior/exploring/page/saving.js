// Pictures, codes and links that leave the page.

import { makeCanvas } from "./assets.js";
import { nameModel, writeLink } from "./link.js";
import { writeNpz } from "./npz.js";

const SHEET_SIDE = 512; // pixels of each view
const ELSEWHERE = "On another computer, append the part from # to the address of the page there.";

export class Saving {
  constructor(app) {
    this.app = app;
    const on = (id, action) => {
      document.getElementById(id).addEventListener("click", async () => {
        document.getElementById("save").open = false;
        if (app.editor.grid.holes && id !== "share") {
          app.fail(new Error("Some places are erased: fill them, or undo, before you save."));
          return;
        }
        try {
          await action();
        } catch (error) {
          app.fail(error);
        }
      });
    };
    on("save-picture", () => this.savePicture());
    on("save-sheet", () => this.saveSheet());
    on("save-codes", () => this.saveCodes());
    on("share", () => this.share());
    document.addEventListener("click", (event) => {
      const menu = document.getElementById("save");
      if (menu.open && !menu.contains(event.target)) menu.open = false;
    });
  }

  get name() {
    return this.app.manifest.model.name.replace(/[^\w.-]+/g, "-");
  }

  async savePicture() {
    await this.settle();
    await this.saveCanvas(this.app.decoded, `${this.name}.png`);
  }

  async settle() {
    const { app } = this;
    await app.started;
    while (app.busy || app.wanted) {
      if (!app.engine) break;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    if (!app.settled) throw new Error("There is no picture to save: these codes could not be decoded.");
    await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
  }

  async saveCanvas(canvas, name) {
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    this.saveBlob(blob, name);
  }

  saveBlob(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    this.app.say(`Saved ${name}.`);
  }

  /** Original, codes, picture and difference, with their names. */
  async saveSheet() {
    await this.settle();
    const { app } = this;
    const { width, height } = app.manifest.image;
    const high = Math.round((SHEET_SIDE * height) / width);
    const gap = 24;
    const sheet = makeCanvas(4 * SHEET_SIDE + 5 * gap, high + 2 * gap + 40);
    const context = sheet.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, sheet.width, sheet.height);
    context.font = "600 24px system-ui, sans-serif";
    ["original", "codes", "picture", "difference"].forEach((id, i) => {
      const x = gap + i * (SHEET_SIDE + gap);
      context.fillStyle = "#1c2127";
      context.fillText(document.querySelector(`[data-board="${id}"] b`).textContent, x, gap + 22);
      const view = id === "picture" ? app.decoded : document.getElementById(id);
      context.imageSmoothingEnabled = view.width > SHEET_SIDE;
      context.drawImage(view, x, gap + 40, SHEET_SIDE, high);
    });
    await this.saveCanvas(sheet, `${this.name}-views.png`);
  }

  /** As stage=extract export=npz names them: one image. */
  saveCodes() {
    const { codes } = this.app.manifest;
    const run = nameModel(this.app.manifest);
    const grid = codes.layout === "grid" ? [codes.rows, codes.columns] : codes.shape;
    const blob = writeNpz({
      indices: { type: "<i8", data: Array.from(this.app.editor.grid.codes), shape: [1, ...codes.shape] },
      labels: { type: "<i8", data: [-1], shape: [1] },
      K: { type: "<i8", data: [codes.K], shape: [] },
      grid: { type: "<i8", data: grid, shape: [grid.length] },
      views: { type: "<i8", data: [1], shape: [] },
      n: { type: "<i8", data: [1], shape: [] },
      run: { type: `<U${run.length}`, data: run, shape: [] },
    });
    this.saveBlob(blob, `${this.name}-codes.npz`);
  }

  get address() {
    const { editor, manifest } = this.app;
    return location.href.split("#")[0] + writeLink(manifest, editor.grid, editor.source);
  }

  async share() {
    const text = this.address;
    history.replaceState(null, "", text);
    try {
      await navigator.clipboard.writeText(text);
      this.app.say(isLocal() ? `Link copied. ${ELSEWHERE}` : "Link copied: it opens this page with these codes.");
    } catch {
      const words = isLocal() ? `It opens this page with these codes. ${ELSEWHERE}` : "It opens this page with these codes.";
      document.getElementById("link-words").textContent = words;
      const field = document.getElementById("link-text");
      field.value = text;
      document.getElementById("link-dialog").showModal();
      field.select();
    }
  }
}

/** Whether the page's address means something on this computer only. */
function isLocal() {
  return location.protocol === "file:" || ["127.0.0.1", "localhost"].includes(location.hostname);
}
