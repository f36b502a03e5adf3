// The interactive page: sends a picture to the local server and shows the result.
// Appended to page.js; shares its globals (byId, make, clamp, show).

const DEBOUNCE_MS = 200; // After a stroke, before sending.
const PEN_PX = 22, STEP_PX = 10;
const settings = JSON.parse(byId("settings").textContent);
const token = location.hash.slice(1);
let pendingRequest = null; // Abort controller of the request in flight; a new request cancels it.
let lastInput = null; // The last picture that was sent: {body, title}.
let timer = 0;

async function predict(body, title) {
  clearTimeout(timer);
  pendingRequest?.abort();
  const controller = (pendingRequest = new AbortController());
  lastInput = { body, title };
  byId("state").textContent = "Predicting…";
  try {
    const query = new URLSearchParams({ model: byId("model").value, title, explain: byId("explain").checked ? "1" : "0" });
    const response = await fetch(`/predict?${query}`, {
      method: "POST", body, signal: controller.signal, headers: { "content-type": "application/octet-stream", "x-convscope-token": token },
    });
    const data = await response.json();
    if (controller.signal.aborted) return;
    if (data.error) throw new Error(`${data.error.code}: ${data.error.message}`);
    await show(data);
    byId("error").textContent = "";
    const best = data.scores[0];
    const figure = best && (best.value === undefined ? `${(100 * best.probability).toFixed(1)} %` : formatNumber(best.value));
    byId("state").textContent = best ? `${best.label}, ${figure}` : "Feature maps below.";
  } catch (error) {
    if (controller.signal.aborted) return;
    byId("state").textContent = "";
    byId("error").textContent = error instanceof TypeError ? "The local server is not responding. Is `convscope ui` still running?" : error.message;
  }
}

function predictFile(file) {
  if (file.size > settings.max_bytes) {
    byId("error").textContent = `image_too_large: more than ${settings.max_bytes.toLocaleString("en")} bytes`;
    return;
  }
  predict(file, file.name);
}

function initDropZone() {
  const drop = byId("drop");
  byId("file").addEventListener("change", (event) => event.target.files[0] && predictFile(event.target.files[0]));
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
    if (file) predictFile(file);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) predictFile(file);
  });
}

function initPad() {
  const pad = byId("pad"), context = pad.getContext("2d");
  const pen = { x: 140, y: 140, down: false };
  const clear = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, pad.width, pad.height);
  };
  Object.assign(context, { strokeStyle: "#fff", lineWidth: PEN_PX, lineCap: "round", lineJoin: "round" });
  const schedulePredict = () => {
    clearTimeout(timer);
    timer = setTimeout(() => pad.toBlob((blob) => predict(blob, "drawing"), "image/png"), DEBOUNCE_MS);
  };
  const move = (x, y, draw) => {
    if (draw) {
      context.beginPath();
      context.moveTo(pen.x, pen.y);
      context.lineTo(x, y);
      context.stroke();
      schedulePredict();
    }
    Object.assign(pen, { x, y });
  };
  const canvasPoint = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * pad.width, ((event.clientY - box.top) / box.height) * pad.height];
  };
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    move(...canvasPoint(event), false);
    move(pen.x, pen.y, true);
  });
  pad.addEventListener("pointermove", (event) => event.buttons & 1 && move(...canvasPoint(event), true));
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
for (const id of ["model", "explain"]) byId(id).addEventListener("change", () => lastInput && predict(lastInput.body, lastInput.title));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
initDropZone();
initPad();
if (!token) byId("error").textContent = "Missing token: open the full URL that `convscope ui` printed.";
