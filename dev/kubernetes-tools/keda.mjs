// Reads KEDA's objects as JSON and says, a line each, what in them is not as KEDA's own definitions want it.
import { text } from 'node:stream/consumers';
import process from 'node:process';
import * as keda from '@kubernetes-models/keda/keda.sh/v1alpha1';

for (const { path, document } of JSON.parse(await text(process.stdin))) {
  const Kind = keda[document.kind];
  if (!Kind) {
    console.log(`${path}: KEDA has no ${document.kind}`);
    continue;
  }
  try {
    new Kind(document).validate();
  } catch (error) {
    console.log(`${path}: ${document.kind}: ${error.message}`);
  }
}
