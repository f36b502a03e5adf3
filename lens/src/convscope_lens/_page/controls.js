// The page to play with: takes a picture, asks the program that served this page, and shows the answer.

const PAUSE_MS = 200; // After a stroke, before asking.
const PEN_PX = 22, STEP_PX = 10;
const settings = JSON.parse(byId("settings").textContent);
const token = location.hash.slice(1);
let asked = null; // Of the question in flight: the newest wins.
let last = null; // The picture asked about last: {body, title}.
let timer = 0;

async function ask(body, title) {
  clearTimeout(timer);
  asked?.abort();
  const mine = (asked = new AbortController());
  last = { body, title };
  byId("state").textContent = "Asking…";
  try {
    const query = new URLSearchParams({ model: byId("model").value, title, explain: byId("explain").checked ? "1" : "0" });
    const answer = await fetch(`/see?${query}`, {
      method: "POST", body, signal: mine.signal, headers: { "content-type": "application/octet-stream", "x-convscope-token": token },
    });
    const said = await answer.json();
    if (mine.signal.aborted) return;
    if (said.error) throw new Error(`${said.error.code}: ${said.error.message}`);
    await show(said);
    byId("error").textContent = "";
    const best = said.scores[0];
    byId("state").textContent = best ? `${best.label}, ${(100 * best.probability).toFixed(1)} %` : "Maps below.";
  } catch (error) {
    if (mine.signal.aborted) return;
    byId("state").textContent = "";
    byId("error").textContent = error instanceof TypeError ? "The program behind this page does not answer." : error.message;
  }
}

function askAboutFile(file) {
  if (file.size > settings.max_bytes) {
    byId("error").textContent = `image_too_large: more than ${settings.max_bytes.toLocaleString("en")} bytes`;
    return;
  }
  ask(file, file.name);
}

function openDrop() {
  const drop = byId("drop");
  byId("file").addEventListener("change", (event) => event.target.files[0] && askAboutFile(event.target.files[0]));
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  document.addEventListener("dragleave", (event) => event.relatedTarget || drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) askAboutFile(file);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) askAboutFile(file);
  });
}

function openPad() {
  const pad = byId("pad"), context = pad.getContext("2d");
  const pen = { x: 140, y: 140, down: false };
  const clear = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, pad.width, pad.height);
  };
  Object.assign(context, { strokeStyle: "#fff", lineWidth: PEN_PX, lineCap: "round", lineJoin: "round" });
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(() => pad.toBlob((blob) => ask(blob, "drawing"), "image/png"), PAUSE_MS);
  };
  const move = (x, y, draw) => {
    if (draw) {
      context.beginPath();
      context.moveTo(pen.x, pen.y);
      context.lineTo(x, y);
      context.stroke();
      later();
    }
    Object.assign(pen, { x, y });
  };
  const spot = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * pad.width, ((event.clientY - box.top) / box.height) * pad.height];
  };
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    move(...spot(event), false);
    move(pen.x, pen.y, true);
  });
  pad.addEventListener("pointermove", (event) => event.buttons & 1 && move(...spot(event), true));
  pad.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0], " ": [0, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    if (event.key === " ") pen.down = !pen.down;
    move(clamp(pen.x + step[0] * STEP_PX, 0, pad.width), clamp(pen.y + step[1] * STEP_PX, 0, pad.height), pen.down);
    byId("pen").textContent = `Pen ${pen.down ? "down" : "up"} at row ${Math.round(pen.y)}, column ${Math.round(pen.x)} of 280.`;
  });
  byId("clear").addEventListener("click", () => {
    clear();
    clearTimeout(timer);
    pen.down = false;
    byId("pen").textContent = "The pad is clear.";
  });
  clear();
}

for (const name of settings.models) byId("model").append(make("option", { value: name }, name));
for (const id of ["model", "explain"]) byId(id).addEventListener("change", () => last && ask(last.body, last.title));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
openDrop();
openPad();
if (!token) byId("error").textContent = "The URL lacks its token: open the whole URL that `convscope ui` printed.";
