// The layers of an image on a canvas: the picture, what a group keeps of it, maps over it.

const HEAT_ALPHA = 0.62;
const FADED_ALPHA = 0.86;
const SMALL = 160; // px, the least width of a canvas

// Viridis, every sixteenth of it.
const RAMP = [
  [68, 1, 84], [72, 24, 106], [71, 45, 123], [66, 64, 134], [59, 82, 139], [51, 99, 141],
  [44, 114, 142], [38, 130, 142], [33, 145, 140], [31, 160, 136], [40, 174, 128], [63, 188, 115],
  [94, 201, 98], [132, 212, 75], [173, 220, 48], [216, 226, 25], [253, 231, 37],
];

const layers = [
  { kind: "picture", name: "Picture" },
  ...Array.from({ length: groups }, (_, group) => ({
    kind: "kept",
    name: `Kept by group ${group + 1}`,
    group,
  })),
  ...data.layers.map((layer, number) => ({ ...layer, kind: "map", number })),
];

function colourOf(share) {
  const place = share * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((value, i) => value + (place - low) * (RAMP[low + 1][i] - value));
}

function rampGradient() {
  const stops = RAMP.map((colour) => `rgb(${colour})`);
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

async function pictureOf(index) {
  const picture = new Image();
  picture.src = images[index].picture;
  await picture.decode();
  return picture;
}

// Draws one layer; width: px that the canvas should have at least.
function draw(canvas, picture, layer, index, position, width = SMALL) {
  const enlarged = Math.max(1, Math.round(width / picture.naturalWidth));
  canvas.width = picture.naturalWidth * enlarged;
  canvas.height = picture.naturalHeight * enlarged;
  const tiny = picture.naturalHeight <= 96;
  canvas.style.imageRendering = tiny ? "pixelated" : "auto";
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = !tiny;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (layer.kind === "kept") fadeDropped(context, canvas, layer.group, index, position);
  if (layer.kind === "map") drawMap(context, canvas, layer, index);
  separateFrames(context, canvas);
}

function fadeDropped(context, canvas, group, index, position) {
  const depths = depthsOf(bytesOf(images[index].depth), position);
  const faded = fadedColour();
  const cells = [...depths].flatMap((depth) =>
    depth > group ? [0, 0, 0, 0] : [...faded, 255 * FADED_ALPHA],
  );
  drawCells(context, canvas, cells, data.rows, data.columns, false);
}

function drawMap(context, canvas, layer, index) {
  const faded = fadedColour();
  const cells = [...bytesOf(images[index].maps[layer.number])].flatMap((code) =>
    code === 0
      ? [...faded, 255 * FADED_ALPHA]
      : [...colourOf((code - 1) / 254), 255 * HEAT_ALPHA],
  );
  drawCells(context, canvas, cells, layer.rows, layer.columns, layer.smooth);
}

// Cells of red, green, blue and alpha, enlarged to the canvas.
function drawCells(context, canvas, cells, rows, columns, smooth) {
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, rows];
  small.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(cells), columns), 0, 0);
  context.imageSmoothingEnabled = smooth;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function separateFrames(context, canvas) {
  context.fillStyle = cssColour("--surface");
  const line = Math.max(1, Math.round(canvas.width / 400));
  for (let frame = 1; frame < data.frames; frame++) {
    const left = Math.round((frame * canvas.width) / data.frames - line / 2);
    context.fillRect(left, 0, line, canvas.height);
  }
}

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// What dropped patches fade into: red, green, blue.
function fadedColour() {
  return cssColour("--faded").split(" ").map(Number);
}
