// The document as one page of static HTML, made by AsyncAPI's own component without a browser.
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import process from 'node:process';
import { Parser, fromFile } from '@asyncapi/parser';
import React from 'react';
import { renderToStaticMarkup } from 'react-dom/server';

const require = createRequire(import.meta.url);
const { AsyncApiComponentWP } = require('@asyncapi/react-component');
const [, , file, directory] = process.argv;
const { document, diagnostics } = await fromFile(new Parser(), file).parse();
if (!document) throw new Error(JSON.stringify(diagnostics, null, 2));
const config = { show: { errors: false }, expand: { messageExamples: false } };
const body = renderToStaticMarkup(React.createElement(AsyncApiComponentWP, { schema: document, config }));
const style = await readFile(require.resolve('@asyncapi/react-component/styles/default.min.css'), 'utf8');
const title = document.info().title();
const page = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>${title}</title><style>${style}</style></head><body>${body}</body></html>
`;
await mkdir(directory, { recursive: true });
await writeFile(path.join(directory, 'index.html'), page);
console.log(`${path.join(directory, 'index.html')}: ${page.length} bytes`);
