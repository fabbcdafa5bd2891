// What AsyncAPI's own parser finds in a document. Warnings are shown; an error ends it with 1.
import process from 'node:process';
import { Parser, fromFile } from '@asyncapi/parser';

const names = ['error', 'warning', 'information', 'hint'];
const { document, diagnostics } = await fromFile(new Parser(), process.argv[2]).parse();
for (const { severity, message, path } of diagnostics) {
  console.log(`${names[severity]}: /${path.join('/')}: ${message}`);
}
if (!document || diagnostics.some(({ severity }) => severity === 0)) {
  console.log('the document is wrong');
  process.exit(1);
}
const [channels, operations, messages] = [document.channels(), document.operations(), document.components().messages()];
console.log(
  `AsyncAPI ${document.version()}: ${channels.all().length} channels, ${operations.all().length} operations, ` +
    `${messages.all().length} messages; nothing is wrong`,
);
