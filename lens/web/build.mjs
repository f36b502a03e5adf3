// Bundles the page into one script and one style sheet, with the licences of what is in them: node build.mjs FOLDER
import { build } from "esbuild";
import { copyFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const folder = process.argv[2];
const { metafile } = await build({
  absWorkingDir: here("."),
  entryPoints: { page: "src/main.jsx" },
  outdir: folder.startsWith("/") ? folder : join(process.cwd(), folder),
  bundle: true,
  minify: true,
  format: "iife",
  target: ["es2022"],
  charset: "utf8",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none", // The licence is a file of its own.
  metafile: true,
});
const packages = new Set(Object.keys(metafile.inputs).map((path) => path.match(/node_modules\/((@[^/]+\/)?[^/]+)/)?.[1]).filter(Boolean));
for (const name of packages) await copyFile(here(`node_modules/${name}/LICENSE`), join(folder, `${name.replace("/", "-")}.LICENSE`));
