// The live page: sends pictures to the local server, asks about them, and shows what it answers.
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { EditList, parseEdits, writeEdits } from "./edits.jsx";
import { changeText, scoreText } from "./format.js";
import { Heading, Network, Skeleton, Tables, unpack } from "./network.jsx";
import { centre, invert, PAD_PX } from "./pad.js";

const DEBOUNCE_MS = 200; // After a stroke, before sending.
const EDIT_MS = 100; // After an edit, likewise: a slider moves many times.
const PEN_PX = 22, STEP_PX = 10;
const DRAWING = "drawing";
const METHOD_NAMES = { grad_cam: "Grad-CAM", cam: "CAM", occlusion: "occlusion", input_gradient: "input gradient", integrated_gradients: "integrated gradients" };
const OF_LAYERS = ["grad_cam", "cam"]; // Methods that work on a layer's map.
const DEFAULTS = { model: "", picture: "", method: "", layer: "", target: "", top_k: "5", opacity: "75", scale: "", compare: "", edits: "", at: "", at2: "" };

// The address is #TOKEN&name=value...: it is never sent to a server.
function readAddress() {
  const [token, ...rest] = location.hash.slice(1).split("&"), given = new URLSearchParams(rest.join("&"));
  return { token, state: Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, given.get(name) ?? value])) };
}

function writeAddress(token, state) {
  const given = new URLSearchParams(Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]));
  history.replaceState(null, "", `#${[token, given].filter(String).join("&")}`);
}

// Requests to the local server; an error has its code and message.
async function send(token, path, query = {}, options = {}) {
  let response;
  try {
    response = await fetch(`/${path}?${new URLSearchParams(query)}`, { ...options, headers: { "x-convscope-token": token, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The local server is not responding. Is `convscope ui` still running?");
  }
  if (response.ok) return response;
  const { error } = await response.json();
  throw new Error(`${error.code}: ${error.message}`);
}

// The answer to a query, and whether it is that to an earlier one: {result, error, waiting}.
function useResult(token, query) {
  const [answer, setAnswer] = useState({ result: null, error: "", key: "", query: null }), key = JSON.stringify(query);
  useEffect(() => {
    if (!query) {
      setAnswer({ result: null, error: "", key, query });
      return undefined;
    }
    const controller = new AbortController();
    const ask = () => send(token, "predict", query, { signal: controller.signal })
      .then((response) => response.json()).then(unpack)
      .then((result) => controller.signal.aborted || setAnswer({ result, error: "", key, query }))
      .catch((error) => controller.signal.aborted || setAnswer((old) => ({ ...old, error: error.message, key })));
    const timer = setTimeout(ask, query.edits ? EDIT_MS : 0);
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [key, token]);
  return { ...answer, waiting: answer.key !== key };
}

// The edits of the address, and how they change; undo goes back until the network is another one.
function useEditing(state, change) {
  const edits = useMemo(() => parseEdits(state.edits), [state.edits]);
  const [past, setPast] = useState([]), latest = useRef(""); // The name of the latest change, as of a slider's moves.
  useEffect(() => {
    setPast([]);
    latest.current = "";
  }, [state.model]);
  return {
    edits,
    text: state.edits,
    canUndo: past.length > 0,
    edit: (next, name = "") => {
      const text = writeEdits(next);
      if (text === state.edits) return;
      if (!name || name !== latest.current) setPast([...past, state.edits]);
      latest.current = name;
      change({ edits: text });
    },
    undo: () => {
      latest.current = "";
      change({ edits: past.at(-1) });
      setPast(past.slice(0, -1));
    },
  };
}

export function Live({ settings: given }) {
  const [models, setModels] = useState(given.models), settings = { ...given, models };
  const [{ token, state }, setAddress] = useState(() => {
    const { token, state } = readAddress(), known = settings.models.some(({ name }) => name === state.model);
    return { token, state: { ...state, model: known ? state.model : settings.models[0].name } };
  });
  const [pictures, setPictures] = useState([]);
  const [problem, setProblem] = useState(token ? "" : "Missing token: open the full URL that `convscope ui` printed.");
  const drawing = useRef(""); // Id of the drawing: it is one entry of the filmstrip, however often it changes.
  const change = useCallback((values) => setAddress((old) => ({ ...old, state: { ...old.state, ...values } })), []);
  useLayoutEffect(() => writeAddress(token, state), [state]);
  useEffect(() => {
    const follow = () => setAddress((old) => {
      const address = readAddress();
      return { ...address, state: { ...address.state, model: address.state.model || old.state.model } };
    });
    addEventListener("hashchange", follow);
    if (token) send(token, "pictures").then((response) => response.json()).then(setPictures).catch((error) => setProblem(error.message));
    return () => removeEventListener("hashchange", follow);
  }, []);

  const model = settings.models.find(({ name }) => name === state.model), editing = useEditing(state, change);
  const add = useCallback(async (files) => {
    setProblem("");
    const problems = [];
    let first = null;
    for (const { blob, title } of files) {
      try {
        if (blob.size > settings.max_bytes) throw new Error(`image_too_large: more than ${settings.max_bytes.toLocaleString("en")} bytes`);
        const response = await send(token, "pictures", { title, replaces: title === DRAWING ? drawing.current : "" }, { method: "POST", body: blob, headers: { "content-type": "application/octet-stream" } });
        const picture = await response.json();
        const replaced = (one) => one.id !== picture.id && !(title === DRAWING && one.title === DRAWING);
        setPictures((old) => [...old.filter(replaced), picture]);
        first ??= picture.id;
        if (title === DRAWING) drawing.current = picture.id;
      } catch (error) {
        problems.push(files.length > 1 ? `${title}: ${error.message}` : error.message);
      }
    }
    if (first) change({ picture: first });
    setProblem(problems.join(" "));
  }, [token]);
  const addFiles = useCallback((list) => list.length && add([...list].map((file) => ({ blob: file, title: file.name || "pasted picture" }))), [add]);

  const all = [...settings.samples, ...pictures];
  const base = state.picture && { picture: state.picture, top_k: state.top_k, ...(state.method && { method: state.method }) };
  const asked = base && { ...base, model: state.model, ...questions(state, model, model), ...(state.edits && { edits: state.edits }) };
  const [kind, other] = [state.compare.slice(0, state.compare.indexOf(":")), state.compare.slice(state.compare.indexOf(":") + 1)];
  const otherModel = kind === "network" ? settings.models.find(({ name }) => name === other) : model;
  const compared = base && kind && otherModel && (kind === "network"
    ? { ...base, model: other, ...questions(state, model, otherModel) }
    : { ...asked, picture: other });
  const one = useResult(token, asked || null), two = useResult(token, compared || null);
  const loadModels = () => send(token, "models").then((response) => response.json()).then(setModels).catch(() => {}); // The next answer says what is wrong.
  const version = one.result?.data.model.name === model.name && one.result.data.model.version;
  useEffect(() => { if (token) loadModels(); }, []);
  useEffect(() => { if (version && version !== model.version) loadModels(); }, [version]); // The service has taken in another archive.
  const error = problem || (one.waiting ? "" : one.error), best = one.result?.data.scores[0];
  const status = one.waiting && asked ? "Predicting…" : error || !asked ? "" : best ? `${best.label}, ${scoreText(best, 1)}${best.change ? `, ${changeText(best.change)} by the edits` : ""}` : "Feature maps below.";
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById("main")?.focus(); }}>Skip to the network</a>
      <header class="top">
        {one.result ? <Heading data={one.result.data} /> : <><h1 id="title">convscope</h1><p class="hint" id="model-info">{model.description}</p></>}
      </header>
      <Sources {...{ settings, model, pictures, state, change, addFiles, add }} />
      <Questions {...{ settings, model, state, change, all }} />
      <p id="state" role="status">{status}</p>
      <p id="error" role="alert" class="error">{error}</p>
      <EditList {...{ settings, editing, model }} title={all.find(({ id }) => id === state.picture)?.title ?? "picture.png"} />
      {!one.result && <Skeleton key={model.name} model={model} />}
      <div class={compared ? "pair" : ""}>
        <main id="main" tabIndex={-1} hidden={!one.result}>
          {one.result && <Answer answer={one} failed={!!one.error} {...{ token, state, change }} editing={model.edits.length > 0 ? editing : null} at={state.at} onAt={(at) => change({ at })} />}
        </main>
        {compared && <section class="other" aria-label="Compared with">
          {two.result && <Heading data={two.result.data} level={2} prefix="b-" />}
          <p role="status">{two.waiting ? "Predicting…" : ""}</p>
          {two.error && <p class="error" role="alert">{two.error}</p>}
          {two.result && <Answer answer={two} failed={!!two.error} prefix="b-" {...{ token, state, change }} at={state.at2} onAt={(at2) => change({ at2 })} />}
        </section>}
      </div>
    </>
  );
}

// What is asked of a network beside the picture: a layer that it does not have is left out, and a class goes by its label.
function questions(state, model, other) {
  const layer = OF_LAYERS.includes(state.method) && other.layers.some(({ name }) => name === state.layer) ? state.layer : "";
  const target = state.target === "" ? -1 : other === model ? Number(state.target) : other.classes.indexOf(model.classes[Number(state.target)]);
  return { ...(layer && { layer }), ...(target >= 0 && { target }) };
}

function Answer({ answer: { result, waiting, query }, failed, prefix = "", token, state, change, editing, at, onAt }) {
  const stale = waiting || failed, { data } = result;
  const kernels = useCallback(async (layer, channel) => (await send(token, "filters", { model: query.model, layer, channel })).json(), [token, query.model]);
  const ask = useMemo(() => ({
    target: prefix || query.edits ? null : (index) => change({ target: String(index) === state.target ? "" : String(index) }),
    map: async (layer, channel) => (await send(token, "map", { model: query.model, picture: query.picture, layer, ...(channel === null ? {} : { channel }), ...(query.edits && { edits: query.edits }) })).arrayBuffer(),
    kernels,
  }), [token, query, kernels, state.target]);
  return (
    <div class={stale ? "result stale" : "result"} aria-busy={String(waiting)}>
      <p class="stale-note">{stale ? `Old: the result of ${data.title}, ${data.model.name}${waiting ? ", until the new one is here." : "."}` : ""}</p>
      {!prefix && <h2>Feature maps by layer</h2>}
      <Network {...{ result, prefix, ask, editing, at, onAt }} opacity={Number(state.opacity)} wholeLayer={state.scale === "layer"} />
      <Tables data={data} prefix={prefix} />
      <p class="hint">convscope, request {data.model.request}</p>
    </div>
  );
}

// Where pictures come from: files, samples, the camera, the pad; and those that are there.
function Sources({ settings, model, pictures, state, change, addFiles, add }) {
  const [over, setOver] = useState(false), [camera, setCamera] = useState(false);
  useEffect(() => {
    const enter = (event) => {
      event.preventDefault();
      setOver(true);
    };
    const leave = (event) => event.relatedTarget || setOver(false);
    const drop = (event) => {
      event.preventDefault();
      setOver(false);
      addFiles(event.dataTransfer.files);
    };
    const paste = (event) => addFiles(event.clipboardData.files);
    const listeners = { dragenter: enter, dragover: enter, dragleave: leave, drop, paste };
    for (const [name, listener] of Object.entries(listeners)) document.addEventListener(name, listener);
    return () => { for (const [name, listener] of Object.entries(listeners)) document.removeEventListener(name, listener); };
  }, [addFiles]);
  const choose = (id) => change({ picture: id });
  return (
    <section class="sources" aria-label="Pictures">
      <div>
        <div id="drop" class={over ? "over" : ""}>
          <label for="file">Drop or paste pictures here, or choose some</label>
          <input type="file" id="file" multiple accept="image/png,image/jpeg,image/webp,.npy" onChange={(event) => addFiles(event.currentTarget.files)} />
          {navigator.mediaDevices?.getUserMedia && <button type="button" onClick={() => setCamera(!camera)} aria-expanded={String(camera)}>Camera</button>}
        </div>
        {camera && <Camera add={add} close={() => setCamera(false)} />}
        <Film label="Samples" pictures={settings.samples} chosen={state.picture} choose={choose} />
        {pictures.length > 0 && <Film label="Your pictures" pictures={pictures} chosen={state.picture} choose={choose} />}
      </div>
      <Pad add={add} model={model} />
    </section>
  );
}

function Film({ label, pictures, chosen, choose }) {
  return (
    <div class="film" role="group" aria-label={label}>
      <span class="hint">{label}</span>
      <ul>{pictures.map(({ id, title, thumbnail }) => (
        <li key={id}><button type="button" aria-pressed={String(id === chosen)} aria-label={title} title={title} onClick={() => choose(id)}>
          {thumbnail ? <img src={thumbnail} alt="" /> : <span>{title}</span>}
        </button></li>
      ))}</ul>
    </div>
  );
}

function Camera({ add, close }) {
  const video = useRef(null), [problem, setProblem] = useState("");
  useEffect(() => {
    let stream = null, ended = false;
    navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }).then((opened) => {
      stream = opened;
      if (ended) stop();
      else video.current.srcObject = opened;
    }, (error) => setProblem(`The camera cannot be used: ${error.message}`));
    const stop = () => stream?.getTracks().forEach((track) => track.stop());
    return () => {
      ended = true;
      stop();
    };
  }, []);
  const take = () => {
    const { videoWidth: width, videoHeight: height } = video.current, canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.getContext("2d").drawImage(video.current, 0, 0);
    canvas.toBlob((blob) => add([{ blob, title: "photograph" }]), "image/jpeg", 0.95);
    close();
  };
  return (
    <div class="camera">
      {problem ? <p class="error">{problem}</p> : <><video ref={video} autoPlay muted playsInline aria-label="What the camera sees" />
        <button type="button" onClick={take}>Take the picture</button></>}
    </div>
  );
}

// A pad to draw on. The ink is kept white on black; what is shown and sent may be the reverse.
function Pad({ add, model }) {
  const canvas = useRef(null), timer = useRef(0), pen = useRef({ x: PAD_PX / 2, y: PAD_PX / 2, down: false });
  const [dark, setDark] = useState(false), [centred, setCentred] = useState(true), [said, setSaid] = useState("");
  const latest = useRef(null);
  latest.current = { dark, centred, model, add };
  const ink = () => canvas.current.getContext("2d", { willReadFrequently: true });
  const clear = () => {
    const context = ink();
    context.fillStyle = "#000";
    context.fillRect(0, 0, PAD_PX, PAD_PX);
  };
  useEffect(() => {
    clear();
    Object.assign(ink(), { strokeStyle: "#fff", lineWidth: PEN_PX, lineCap: "round", lineJoin: "round" });
  }, []);
  const send = () => {
    const { dark, centred, model, add } = latest.current, [, height, width] = model.input;
    const scale = height === 28 && width === 28 ? 1 : 10;
    const picture = centred ? centre(canvas.current, scale) : canvas.current;
    if (picture) (dark ? invert(picture) : picture).toBlob((blob) => add([{ blob, title: DRAWING }]), "image/png");
  };
  const schedule = () => {
    clearTimeout(timer.current);
    timer.current = setTimeout(send, DEBOUNCE_MS);
  };
  const drawn = useRef(false);
  useEffect(() => { if (drawn.current) schedule(); }, [dark, centred, model.name]);
  const move = (x, y, draw) => {
    if (draw) {
      const context = ink();
      context.beginPath();
      context.moveTo(pen.current.x, pen.current.y);
      context.lineTo(x, y);
      context.stroke();
      drawn.current = true;
      schedule();
    }
    Object.assign(pen.current, { x, y });
  };
  const point = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * PAD_PX, ((event.clientY - box.top) / box.height) * PAD_PX];
  };
  const press = (event) => {
    canvas.current.setPointerCapture(event.pointerId);
    move(...point(event), false);
    move(pen.current.x, pen.current.y, true);
  };
  const keys = (event) => {
    const steps = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0], " ": [0, 0] };
    const step = steps[event.key], { current: at } = pen;
    if (!step) return;
    event.preventDefault();
    if (event.key === " ") at.down = !at.down;
    const bounded = (value) => Math.min(Math.max(value, 0), PAD_PX);
    move(bounded(at.x + step[0] * STEP_PX), bounded(at.y + step[1] * STEP_PX), at.down);
    setSaid(`Pen ${at.down ? "down" : "up"} at row ${Math.round(at.y)}, column ${Math.round(at.x)} of ${PAD_PX}.`);
  };
  const clearAll = () => {
    clear();
    clearTimeout(timer.current);
    pen.current.down = drawn.current = false;
    setSaid("The pad is clear.");
  };
  return (
    <div class="draw">
      <canvas id="pad" ref={canvas} class={dark ? "inverted" : ""} width={PAD_PX} height={PAD_PX} tabIndex={0} role="application" aria-label="Drawing pad"
        aria-describedby="pad-help" onPointerDown={press} onPointerMove={(event) => event.buttons & 1 && move(...point(event), true)} onKeyDown={keys} />
      <div>
        <p id="pad-help" class="hint">Or draw. Keyboard: arrow keys move the pen, Space lowers or lifts it.</p>
        <p><label><input type="checkbox" checked={centred} onChange={(event) => setCentred(event.currentTarget.checked)} /> centre and scale as MNIST’s digits</label></p>
        <p><label>ink <select value={dark ? "dark" : "light"} onChange={(event) => setDark(event.currentTarget.value === "dark")}>
          <option value="light">white on black</option><option value="dark">black on white</option>
        </select></label></p>
        <p><button type="button" id="clear" onClick={clearAll}>Clear the pad</button></p>
        <p id="pen" role="status" class="hint">{said}</p>
      </div>
    </div>
  );
}

// A number to type. The unfinished text is kept here, since a response that arrives meanwhile draws the form again.
function NumberInput({ value, onChange, ...rest }) {
  const [typed, setTyped] = useState(null);
  const commit = (event) => {
    setTyped(null);
    onChange(event);
  };
  return <input type="number" {...rest} value={typed ?? value} onInput={(event) => setTyped(event.currentTarget.value)} onChange={commit} onBlur={() => setTyped(null)} />;
}

// What is asked: the network, the explanation, the scores, the comparison.
function Questions({ settings, model, state, change, all }) {
  const { methods } = model;
  const ofLayers = OF_LAYERS.includes(state.method || "grad_cam");
  const select = (name) => ({ id: name, value: state[name], onChange: (event) => change({ [name]: event.currentTarget.value || DEFAULTS[name] }) });
  const chooseModel = (event) => change({ model: event.currentTarget.value, layer: "", target: "", compare: "", edits: "" });
  const target = state.target === "" ? null : model.classes[Number(state.target)] ?? `class ${state.target}`;
  return (
    <form id="controls" aria-label="Questions" onSubmit={(event) => event.preventDefault()}>
      <Field id="model" label="Network"><select id="model" value={state.model} onChange={chooseModel}>{settings.models.map(({ name }) => <option key={name} value={name}>{name}</option>)}</select></Field>
      <Field id="method" label="Explain by"><select {...select("method")}>
        <option value="">{methods.includes("grad_cam") ? "automatic" : "nothing"}</option>
        {methods.map((name) => <option key={name} value={name}>{METHOD_NAMES[name] ?? name}</option>)}
        <option value="none">nothing</option>
      </select></Field>
      {ofLayers && <Field id="layer" label="at layer"><select id="layer" value={state.layer} onChange={(event) => change({ layer: event.currentTarget.value, method: state.method || "grad_cam" })}>
        <option value="">automatic</option>
        {model.layers.map(({ name, shape }) => <option key={name} value={name}>{name}{shape.length === 3 && shape[1] * shape[2] === 1 ? " (1×1)" : ""}</option>)}
      </select></Field>}
      <Field id="opacity" label="Opacity"><input type="range" min="0" max="100" step="5" id="opacity" value={state.opacity} onInput={(event) => change({ opacity: event.currentTarget.value })} /></Field>
      <Field id="top_k" label="Scores"><NumberInput min="0" max={Math.max(1, model.classes.length)} {...select("top_k")} /></Field>
      <Field id="scale" label="Colours"><select {...select("scale")}><option value="">per channel</option><option value="layer">per layer</option></select></Field>
      <Field id="compare" label="Compare with"><select {...select("compare")}>
        <option value="">nothing</option>
        <optgroup label="Another network">{settings.models.filter(({ name }) => name !== state.model).map(({ name }) => <option key={name} value={`network:${name}`}>{name}</option>)}</optgroup>
        <optgroup label="Another picture">{all.filter(({ id }) => id !== state.picture).map(({ id, title }) => <option key={id} value={`picture:${id}`}>{title}</option>)}</optgroup>
      </select></Field>
      {target !== null && <button type="button" class="unpress" onClick={() => change({ target: "" })}>Explaining “{target}” – back to the most probable</button>}
    </form>
  );
}

const Field = ({ id, label, children }) => <div class="field"><label for={id}>{label}</label>{children}</div>;
