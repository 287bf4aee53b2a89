// The page's data, and what follows from it: what each group keeps, and what that costs.
// A position is a stop of the slider, an index is that of an image, groups count from 0.

const data = JSON.parse(document.getElementById("explorer-data").textContent);
const { images, positions, groups } = data;
const patches = data.rows * data.columns;
const labelled = images[0].label !== null;

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

// How many groups see each patch of an image, row by row.
function depthsOf(packed, position) {
  const perByte = 8 / data.bits;
  const stride = Math.ceil(patches / perByte);
  const mask = (1 << data.bits) - 1;
  const depths = new Uint8Array(patches);
  for (let n = 0; n < patches; n++) {
    const byte = packed[position * stride + Math.floor(n / perByte)];
    depths[n] = (byte >> (data.bits * (n % perByte))) & mask;
  }
  return depths;
}

// Patches kept in each group: [image][position][group].
const kept = images.map((image) => {
  const packed = bytesOf(image.depth);
  return positions.map((_, position) => {
    const counts = new Array(groups).fill(0);
    for (const depth of depthsOf(packed, position)) {
      for (let group = 0; group < depth; group++) counts[group]++;
    }
    return counts;
  });
});

// Multiply-accumulates; convention: "linear" or "full".
function costOf(counts, convention) {
  const changes = data.costs.changes[convention];
  return counts.reduce(
    (sum, count, group) => sum + changes[group][count],
    data.costs.whole[convention],
  );
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

// The figures of some images at a position, each a mean over them.
function figuresOf(indices, position) {
  const counts = indices.map((index) => kept[index][position]);
  const full = mean(counts.map((each) => costOf(each, "full")));
  const perGroup = counts[0].map((_, group) => mean(counts.map((each) => each[group])));
  return {
    kept: perGroup,
    share: mean(perGroup) / patches,
    linear: mean(counts.map((each) => costOf(each, "linear"))),
    full,
    ofDense: full / data.costs.dense.full,
    right: mean(indices.map((index) => Number(isRight(index, position)))),
  };
}

// Where there are no labels, the answer without dropping takes their place.
function isRight(index, position) {
  const { label, dense, answers } = images[index];
  return answers[position] === (labelled ? label : dense);
}

function isDenseRight(index) {
  return !labelled || images[index].dense === images[index].label;
}

function isLost(index, position) {
  return isDenseRight(index) && !isRight(index, position);
}

function className(index) {
  return data.class_names[index] ?? `class ${index}`;
}
