// Draws what the document holds: the report of a picture, the index of many, or the live page.
// Text of others is only ever inserted as text.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import "./page.css";
import { Index } from "./index.jsx";
import { Live } from "./live.jsx";
import { Heading, Network, Tables, unpack } from "./network.jsx";

const read = (id) => JSON.parse(document.getElementById(id).textContent);

function Report({ data }) {
  const [result, setResult] = useState(null);
  const [at, setAt] = useState(() => new URLSearchParams(location.hash.slice(1)).get("at"));
  const [wholeLayer, setWholeLayer] = useState(false);
  useEffect(() => { unpack(data).then(setResult); }, []);
  const choose = (text) => {
    setAt(text);
    history.replaceState(null, "", `#${new URLSearchParams({ at: text })}`);
  };
  if (!result) return null;
  return (
    <>
      <a class="skip" href="#network">Skip to the network</a>
      <header class="top"><Heading data={data} /></header>
      <main id="main">
        <h2>Feature maps by layer</h2>
        <p class="options"><label><input type="checkbox" checked={wholeLayer} onChange={(event) => setWholeLayer(event.currentTarget.checked)} /> One colour scale for each layer</label></p>
        <div id="network" tabIndex={-1}><Network result={result} at={at} onAt={choose} wholeLayer={wholeLayer} /></div>
        <Tables data={data} />
      </main>
      <footer><p>convscope, request {data.model.request}</p></footer>
    </>
  );
}

const data = read("data"), settings = read("settings");
render(settings ? <Live settings={settings} /> : data.index ? <Index data={data} /> : <Report data={data} />, document.getElementById("page"));
