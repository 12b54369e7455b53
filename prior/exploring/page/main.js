// The page of stage=explore.

import { App } from "./app.js";
import { loadAssets, makeCanvas } from "./assets.js";
import { Boards } from "./boards.js";
import { Tools } from "./tools.js";
import { Inspector, element } from "./inspector.js";
import { CodebookMap } from "./map.js";
import { Gallery } from "./gallery.js";
import { PriorCard } from "./prior_card.js";
import { Morph } from "./morph.js";
import { Saving } from "./saving.js";
import { Grid } from "./state.js";
import { describeCodes } from "./layers.js";
import { readFile } from "./reading.js";
import { readLink } from "./link.js";
import { readManifest } from "./parts.js";
import { startEngine } from "./engine.js";

/** Messages: a line beside the title, and a notice that stays until it is closed. */
function connectMessages(app) {
  const status = document.getElementById("status");
  const notice = document.getElementById("notice");
  let timer = null;
  app.say = (text, stays = false) => {
    status.textContent = text;
    clearTimeout(timer);
    if (!stays) timer = setTimeout(() => (status.textContent = ""), 8000);
  };
  app.addEventListener("problem", () => {
    notice.querySelector("span").textContent = app.problem;
    notice.hidden = false;
  });
  notice.querySelector("button").addEventListener("click", () => (notice.hidden = true));
  app.clearProblem = () => (notice.hidden = true);
}

/** Pictures and codes that are dropped, pasted or picked. */
function connectFiles(app, gallery) {
  const input = document.getElementById("file");
  if (app.manifest.server) input.accept = "image/*,.npz";
  const drop = document.getElementById("drop");

  async function open(file) {
    app.clearProblem();
    try {
      app.say(`Reading ${file.name || "the picture"} …`, true);
      const read = await readFile(file, app.manifest);
      if (read.codes) {
        app.openPicture({ image: null, codes: read.codes, name: read.name });
      } else {
        const { codes, pixels } = await app.engine.encode(read);
        const picture = { image: toImage(pixels), codes, name: read.name };
        gallery.add(picture, read.name, true);
        app.openPicture(picture);
      }
      app.say(read.note ?? "");
    } catch (error) {
      app.say("");
      app.fail(error);
    }
  }

  app.openFile = async (file) => {
    await app.started;
    if (app.engine) await open(file);
  };
  document.getElementById("open").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    for (const file of input.files) app.openFile(file);
    input.value = "";
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (!file) {
      if (!event.target.closest?.("input, textarea")) app.notify("paste");
      return;
    }
    event.preventDefault();
    app.openFile(file);
  });
  addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    drop.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.hidden = true;
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.hidden = true;
    const [file] = event.dataTransfer.files;
    if (file) app.openFile(file);
  });
}

/** A canvas of RGB pixels. */
function toImage({ data, width, height }) {
  const canvas = makeCanvas(width, height);
  const picture = new ImageData(width, height);
  for (let p = 0; p < width * height; p++) {
    for (let c = 0; c < 3; c++) picture.data[4 * p + c] = data[3 * p + c];
    picture.data[4 * p + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

/** Ways to put another picture into the editor. */
function connectOpening(app) {
  app.openPicture = (picture) => {
    app.load(new Grid(picture.codes.slice()), app.sourceOf(picture));
  };
  app.openValidation = (number, image, codes) => {
    const { width, height } = app.manifest.image;
    const canvas = makeCanvas(width, height);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    app.openPicture({ image: image.width === width ? canvas : null, codes, name: `validation image ${number}` });
  };
  app.load = (grid, source) => {
    app.notify("interrupt");
    if (grid.equals(app.editor.grid) && source.image === app.editor.source.image) return;
    app.editor.load(grid, source, "Open");
  };
  app.chooseCode = (code) => {
    if (app.tool === "pick") app.setTool("paint");
    app.setBrush(code);
  };
  app.openLink = () => {
    try {
      const linked = readLink(app.manifest, location.hash);
      if (!linked) return;
      const picture = app.assets.pictures[linked.index];
      const source = app.sourceOf(picture ?? { image: null, ...linked, index: null, name: "the grid of the link" });
      app.load(new Grid(linked.codes, linked.erased), source);
    } catch (error) {
      app.fail(error);
    }
  };
  addEventListener("hashchange", app.openLink);
}

function describePage(app) {
  const { manifest } = app;
  const { codes, model, image } = manifest;
  const K = codes.K.toLocaleString("en");
  document.getElementById("lead").textContent =
    `A neural network reads a picture as ${describeCodes(codes)}, each one of ${K}, and draws it back from them: ` +
    "change a code, and the picture follows.";
  const pixels = image.height * image.width * image.channels;
  const rate = `${codes.bits.toLocaleString("en", { maximumFractionDigits: 0 })} bits instead of the ${(pixels * 8).toLocaleString("en")} of its pixels`;
  document.getElementById("footer").textContent = `Made by Codegrid ${manifest.made.codegrid} on ${manifest.made.date}. A picture here is ${rate}.`;
  const words = document.getElementById("about-words");
  const facts = element("dl");
  const add = (term, text) => text && facts.append(element("dt", "", term), element("dd", "", text));
  const weigh = (name) => (model.weights[name] ? `, ${model.weights[name].toLocaleString("en")} weights` : "");
  add("Run", `${model.name} (${model.id})`);
  add("Tokenizer", [model.tokenizer, model.quantizer].filter(Boolean).join(", "));
  add("Encoder", weigh("encoder").slice(2) + precisionOf(manifest.encoder));
  add("Decoder", weigh("decoder").slice(2) + precisionOf(manifest.decoder));
  if (manifest.prior) add("Prior", model.prior + weigh("prior") + precisionOf(manifest.prior));
  add("Pictures", `${image.width} × ${image.height} pixels, ${image.channels} ${image.channels === 1 ? "channel" : "channels"}`);
  add("A picture", rate);
  add("Checked", describeChecks(manifest.checks));
  words.append(facts);
  words.append(
    element("p", "", manifest.server ? "The models run on this computer, behind this page." : "The models run in this page. Nothing that you open or draw leaves it, and it works without a network."),
  );
  for (const note of manifest.notes ?? []) words.append(element("p", "", note));
  words.append(describeKeys());
  for (const { name, version, licence, copyright } of manifest.licences ?? []) {
    words.append(element("p", "quiet", `${name} ${version ?? ""}: licence ${licence}, ${copyright}`));
  }
  document.getElementById("about-open").addEventListener("click", () => document.getElementById("about").showModal());
}

function precisionOf(graph) {
  return graph?.precision ? `, ${graph.precision}` : "";
}

function describeChecks(checks) {
  if (!checks || checks.largest_difference === null || checks.largest_difference === undefined) return "";
  const codes = checks.equal_codes === null || checks.equal_codes === undefined ? "" : `; ${(100 * checks.equal_codes).toFixed(2)}% of codes equal`;
  return `${checks.pictures} pictures against the model in PyTorch: pixels differ by ${(255 * checks.largest_difference).toFixed(2)} of 255 at most${codes}`;
}

function describeKeys() {
  const list = element("p");
  const keys = [
    ["B I M E X", "tools"], ["Ctrl+Z", "undo"], ["Ctrl+Shift+Z", "redo"], ["arrows, Enter", "move and use the tool on the codes"], ["Shift+arrows", "select"],
    ["Ctrl+C, Ctrl+V", "copy and paste"], ["Delete", "erase the selection"], ["[ ]", "previous and next code"], ["+ −", "size of the brush"], ["Ctrl+wheel, pinch", "zoom the map"],
  ];
  for (const [key, action] of keys) list.append(element("kbd", "", key), ` ${action}   `);
  return list;
}

async function start() {
  const manifest = readManifest();
  const app = new App(manifest, await loadAssets(manifest));
  const { width, height } = manifest.image;
  app.scratch = makeCanvas(width, height);
  globalThis.codegrid = app; // for the console
  connectMessages(app);
  connectOpening(app);
  describePage(app);
  const boards = new Boards(app);
  new Tools(app, boards);
  new Inspector(app);
  new CodebookMap(app);
  const gallery = new Gallery(app);
  new PriorCard(app);
  new Morph(app);
  new Saving(app);
  connectFiles(app, gallery);
  app.openLink();
  app.started = startEngine(manifest, (text) => app.say(text, true)).then(
    (engine) => {
      app.engine = engine;
      app.requestDecode();
      app.notify("ready");
      app.say("");
      Promise.resolve(engine.priorReady).then(
        () => {
          app.priorReady = true;
          app.notify("ready");
        },
        (error) => app.fail(error),
      );
    },
    (error) => app.fail(new Error(`The models can't run in this browser (${error.message}); a browser of the last two years can.`)),
  );
}

start().catch((error) => {
  document.getElementById("status").textContent = "";
  document.getElementById("notice").hidden = false;
  document.querySelector("#notice span").textContent = `This page can't start in this browser: ${error.message}`;
});
