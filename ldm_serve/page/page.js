// The page of `ldm serve`: a form made from what the chosen model takes, one job at a time, and the
// results of this visit. It talks to the native interface alone (/api, /files) and stores nothing.

const EXAMPLES = { 'image-editing': 'make the circle blue' };
const EXAMPLE = 'a large red circle left of a small blue square on a white background';

/** Fields of a request that are placed by hand; those of a model that are not here are "more". */
const INPUTS = ['prompt', 'negative_prompt', 'class_label', 'layout', 'segmentation', 'embeddings', 'depth_map'];
const START = ['image', 'mask_image', 'mask_blur', 'strength'];
const BASICS = ['width', 'height', 'num_inference_steps', 'guidance_scale', 'image_guidance_scale', 'noise_level',
  'sampler', 'num_images', 'seed'];
const LABELS = {
  num_inference_steps: 'Steps', guidance_scale: 'Guidance', image_guidance_scale: 'Image guidance',
  num_images: 'Images', class_label: 'Class', segmentation: 'Segmentation map', mask_image: 'Mask',
  hires_scale: 'Second pass: enlarge', hires_strength: 'Second pass: strength', clip_skip: 'CLIP skip',
  mask_blur: 'Mask blur: width, height', outpaint: 'Outpaint: left, top, right, bottom', zero_terminal_snr: 'Zero terminal SNR',
};
/** What stands next to a field, where its help on the command line would not fit. */
const HINTS = {
  depth_map: 'A gray image or .npy file, the nearest pixels highest.', embeddings: 'A .npy file, one vector per row.',
  strength: 'How much of the image to change: above 0, up to 1.', latents: 'A .npy file: noise to start from, or latents.',
};
const UNHINTED = new Set([...BASICS, 'prompt', 'negative_prompt', 'class_label', 'layout', 'segmentation', 'image', 'mask_image']);
const FILE_FIELDS = new Set(['image', 'mask_image', 'segmentation', 'depth_map', 'embeddings', 'latents']);
const MOST_LISTED = 200; // options of a select; more are searched by typing
const MOST_KEPT = 60; // results in the history
const MOST_PAINTED = 1024; // pixels per side of what is painted; larger masks are enlarged when they are sent
/** Restored settings that say nothing any more once another is changed, as on the command line. */
const REPLACED = {
  preset: ['sampler', 'schedule', 'num_inference_steps', 'eta', 'guidance_scale', 'sigmas'], sampler: ['eta', 'schedule'],
  schedule: ['sigmas'], num_inference_steps: ['sigmas'], sigmas: ['num_inference_steps', 'schedule'], image: ['width', 'height'],
  outpaint: ['width', 'height'],
};
const FULL = 255;
const LONGEST_PAUSE = 10_000; // milliseconds between calls to a server that cannot be reached
const UNREACHED = new Set([502, 503, 504]); // what a proxy answers in its place
const LOST = 'The connection is lost. Trying again…';

const page = {
  key: '', models: [], model: null, properties: {}, limits: {}, controls: new Map(),
  restored: new Set(), typed: new Set(), results: [], shown: null, pinned: null, job: null, isRunning: false, isCancelled: false, retry: null,
};

// --- Small tools ---------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const sleep = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const labelOf = name => LABELS[name] ?? capital(name).replaceAll('_', ' ');
const capital = text => text.charAt(0).toUpperCase() + text.slice(1);
const isFileSummary = value => value !== null && typeof value === 'object' && 'sha256' in value;

/** Return a new element; what is not a property of it becomes an attribute. */
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Parse JSON without rounding large whole numbers: seeds have 64 bits. */
function parseJson(text) {
  return JSON.parse(text, (_, value, context) => {
    const isRounded = typeof value === 'number' && !Number.isSafeInteger(value) && /^\d+$/.test(context?.source ?? '');
    return isRounded ? BigInt(context.source) : value;
  });
}

/** Return JSON, with large whole numbers as they are. */
const toJson = value => JSON.stringify(value, (_, each) => typeof each === 'bigint' ? JSON.rawJSON(String(each)) : each);

const wholeNumber = text => Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text);

/** Return a file as a data: URL, which is how requests hold files. */
function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// --- The server ----------------------------------------------------------------------------------

/** What the server or a control refuses, and the field that is to blame. */
class Refusal extends Error {
  constructor(message, { param = null, code = '', status = 0 } = {}) {
    super(message);
    Object.assign(this, { param, code, status });
  }
}

/** Call the server; a body is sent as JSON. Throws a Refusal unless the answer is a success. */
async function call(path, { body, ...options } = {}) {
  const headers = page.key ? { Authorization: `Bearer ${page.key}` } : {};
  if (body !== undefined) Object.assign(options, { method: 'POST', body: toJson(body) });
  if (body !== undefined) headers['Content-Type'] = 'application/json';
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const error = (await response.json().catch(() => ({}))).error ?? {};
  throw new Refusal(error.message ?? `The server answered ${response.status}.`, { ...error, status: response.status });
}

const getJson = async (path, options) => parseJson(await (await call(path, options)).text());

/** Yield the data of server-sent events. Not an EventSource, which cannot send a key. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (text + value).split('\n\n');
    text = events.pop();
    for (const event of events) yield parseJson(event.slice(event.indexOf('\ndata: ') + '\ndata: '.length));
  }
}

/** Return the body of a job from what the form describes: adapters are the model's, not the request's. */
const bodyOf = ({ adapters, ...request }, model) => ({ request, model: model.name, adapters });

/** Queue a request to a model, and wait for a server that is still opening it. */
async function submit(request, model) {
  for (;;) {
    try {
      return await getJson('/api/jobs', { body: { ...bodyOf(request, model), previews: model.previews } });
    } catch (error) {
      if (error.code !== 'not_ready' || page.isCancelled) throw error;
      say(error.message);
      await pause(1000);
      if (page.isCancelled) throw error;
    }
  }
}

/** Wait, but no longer than until the job is cancelled. */
async function pause(milliseconds) {
  const end = performance.now() + milliseconds;
  while (performance.now() < end && !page.isCancelled) await sleep(100);
}

/**
 * Ask for a job again, after ever longer pauses, while the server cannot be reached but may have it.
 * `ask` calls what it is given once it is answered, if more can be lost afterwards.
 */
async function persist(ask) {
  let lost = null;
  for (;;) {
    try {
      return await ask(() => { lost = null; });
    } catch (error) {
      const isAnswer = error instanceof Refusal && !UNREACHED.has(error.status);
      lost ??= performance.now();
      const silence = performance.now() - lost;
      if (isAnswer || page.isCancelled || silence > 1000 * page.limits.kept_seconds) throw error;
      if ($('status').textContent !== LOST) announce(LOST);
      await pause(clamp(silence, 1000, LONGEST_PAUSE));
    }
  }
}

const OVER = ['completed', 'failed', 'cancelled'];

/** Follow a job to its end, through lost connections, and return its last state. */
async function follow(job) {
  while (!OVER.includes(job.state)) {
    await persist(async heard => {
      for await (job of eventsOf(await call(`/api/jobs/${job.id}/events`))) {
        heard();
        showProgress(job);
      }
    });
    if (!OVER.includes(job.state)) await sleep(1000); // a proxy has cut it off
  }
  return job;
}

// --- Controls: each reads and writes one field of a request --------------------------------------

/** Put a label, a hint and a place for errors around an input, and return the control. */
function labelled(name, input, { read, write, extra = [], hint = hintOf(name) }) {
  input.id = `field-${name}`;
  const node = make('div', { className: 'field' });
  const label = make('label', { htmlFor: input.id, textContent: labelOf(name) });
  if (input.type === 'checkbox') node.append(make('div', { className: 'check' }, input, label));
  else node.append(label, input);
  node.append(...extra, ...notes(name, input, hint));
  return { name, node, target: input, read, write, standard: standardOf(name) };
}

/** Put a legend, a hint and a place for errors around several inputs, and return the control. */
function grouped(name, target, parts, { read, write, hint = hintOf(name) }) {
  const node = make('fieldset', { className: 'field group' }, make('legend', { textContent: labelOf(name) }), ...parts);
  node.append(...notes(name, target, hint));
  return { name, node, target, read, write, standard: undefined };
}

/** Return the hint of a field, if it has one, and the place of its error. */
function notes(name, target, hint) {
  const error = make('p', { id: `error-${name}`, className: 'error', hidden: true });
  if (!hint) return [error];
  target.setAttribute('aria-describedby', `hint-${name}`);
  return [make('p', { id: `hint-${name}`, className: 'hint', textContent: hint }), error];
}

/** Return what is said next to a field: the help of the command line, if nothing better. */
function hintOf(name) {
  if (name in HINTS) return HINTS[name];
  if (UNHINTED.has(name)) return '';
  return capital(page.model.fields[name]).replace(/--([\w-]+)/g, (_, flag) => `“${labelOf(flag.replaceAll('-', '_'))}”`);
}

/** The value that a field has if it is left out. */
function standardOf(name) {
  return page.model.defaults[name] ?? page.properties[name]?.default ?? undefined;
}

/** Return the kind of a field's values, whether or not it may be null. */
function kindOf(name) {
  const schema = page.properties[name];
  return { ...schema, ...(schema.anyOf?.find(each => each.type !== 'null') ?? {}) };
}

/** A text of one line, or of several rows. */
function textControl(name, { rows = 0, placeholder = '' } = {}) {
  const input = rows ? make('textarea', { rows, placeholder }) : make('input', { type: 'text', placeholder });
  return labelled(name, input, {
    read: () => input.value.trim() ? input.value : undefined,
    write: value => { input.value = value ?? ''; },
  });
}

/** A number within the bounds of the schema and of the server; empty is the default. */
function numberControl(name, kind) {
  const step = ['width', 'height'].includes(name) ? page.model.size_step : kind.type === 'integer' ? 1 : 'any';
  const least = ['width', 'height'].includes(name) ? step : kind.minimum;
  const input = make('input', { type: 'number', step, min: least ?? '', max: mostOf(name) ?? kind.maximum ?? '' });
  const control = labelled(name, input, {
    read: () => {
      if (input.validity.badInput) throw new Refusal('Write a number.', { param: name });
      return input.value === '' ? undefined : Number(input.value);
    },
    write: value => { input.value = value ?? control.standard ?? ''; },
  });
  control.write(undefined);
  return control;
}

/** Return the limit of this server, which is lower than that of the schema. */
function mostOf(name) {
  return { num_images: page.limits.max_images, num_inference_steps: page.limits.max_steps }[name];
}

/** A seed: not a number input, which rounds to 53 bits. */
function seedControl(name) {
  const input = make('input', { type: 'text', inputMode: 'numeric', placeholder: 'random', autocomplete: 'off' });
  const control = labelled(name, input, {
    read: () => {
      if (!/^\d*$/.test(input.value.trim())) throw new Refusal('Write a whole number from 0.', { param: name });
      return input.value.trim() ? wholeNumber(input.value.trim()) : undefined;
    },
    write: value => { input.value = value ?? ''; },
  });
  if (name === 'seed') addSeedButtons(control);
  return control;
}

/** Put buttons next to the seed: that of the last image, and a random one. */
function addSeedButtons({ node, target, write }) {
  const last = make('button', { type: 'button', textContent: 'Reuse last', id: 'last-seed', disabled: !page.results.length });
  last.addEventListener('click', () => write(page.results[0].seed));
  const random = make('button', { type: 'button', textContent: 'Random', 'aria-label': 'Random seed' });
  random.addEventListener('click', () => write(undefined));
  node.classList.add('full');
  const row = make('div', { className: 'row' });
  target.replaceWith(row);
  row.append(target, random, last);
}

/** One of several values; without a default of the model, none of them too. */
function selectControl(name, values) {
  const standard = standardOf(name);
  const options = standard === undefined ? ['', ...values] : values;
  const input = make('select', {}, ...options.map(value => make('option', { value, textContent: value || 'default' })));
  input.value = standard ?? '';
  return labelled(name, input, {
    read: () => input.value || undefined,
    write: value => { input.value = value ?? standard ?? ''; },
  });
}

/** A box to tick. */
function checkControl(name) {
  const input = make('input', { type: 'checkbox' });
  return labelled(name, input, { read: () => input.checked, write: value => { input.checked = Boolean(value); } });
}

/** Numbers with commas between them. */
function listControl(name) {
  const input = make('input', { type: 'text', placeholder: '0, 0, …' });
  return labelled(name, input, {
    read: () => {
      if (!input.value.trim()) return undefined;
      const numbers = input.value.split(',').map(Number);
      if (numbers.some(Number.isNaN)) throw new Refusal('Write numbers with commas between them.', { param: name });
      return numbers;
    },
    write: value => { input.value = (value ?? []).join(', '); },
  });
}

/** Return an input for a class of the model, by name or number, and how to read and write it. */
function classChooser(label = '') {
  const { labels, classes } = page.model;
  const texts = labels.length ? labels.map((each, number) => `${each} (${number})`)
    : Array.from({ length: classes ?? 0 }, (_, number) => `class ${number}`);
  const attributes = label ? { 'aria-label': label } : {};
  const numberOf = value => labels.includes(value) ? labels.indexOf(value) : value;
  if (texts.length && texts.length <= MOST_LISTED) {
    const input = make('select', attributes, ...texts.map((textContent, value) => make('option', { value, textContent })));
    return { input, read: () => Number(input.value), write: value => { input.value = numberOf(value); } };
  }
  const most = classes === null ? '' : ` from 0 to ${classes - 1}`;
  const input = make('input', { type: 'text', placeholder: labels.length ? 'a name or number' : `a number${most}`, ...attributes });
  if (labels.length) input.setAttribute('list', classList(labels));
  const read = () => /^\d+$/.test(input.value.trim()) ? Number(input.value) : numberOf(input.value.trim() || undefined);
  return { input, read, write: value => { input.value = labels[value] ?? value ?? ''; } };
}

/** Offer the names of many classes to what is typed. */
function classList(names) {
  $('class-names')?.remove();
  document.body.append(make('datalist', { id: 'class-names' }, ...names.map(value => make('option', { value }))));
  return 'class-names';
}

/** The class of an image. */
function classControl(name) {
  const { input, read, write } = classChooser();
  return labelled(name, input, { read, write });
}

/** The scales of the model's adapters, of which 0 leaves one out. */
function adaptersControl(name) {
  const inputs = new Map(page.model.adapters.map(({ name: adapter }) => [
    adapter, make('input', { type: 'number', step: 0.05, min: -10, max: 10, value: 0, id: `adapter-${adapter}` })]));
  const fields = [...inputs].map(([adapter, input]) =>
    make('div', { className: 'field' }, make('label', { htmlFor: input.id, textContent: adapter }), input));
  const control = grouped(name, inputs.values().next().value, [make('div', { className: 'grid' }, ...fields)], {
    hint: 'How much of each: 1 is as it was trained, 0 is without it.',
    read: () => {
      if ([...inputs.values()].some(input => input.validity.badInput)) throw new Refusal('Write a number.', { param: name });
      const chosen = [...inputs].map(([adapter, input]) => ({ name: adapter, scale: Number(input.value) })).filter(each => each.scale);
      return chosen.length ? chosen : undefined;
    },
    write: value => {
      const scales = new Map((value ?? []).map(each => [each.name, each.scale]));
      for (const [adapter, input] of inputs) input.value = scales.get(adapter) ?? 0;
    },
  });
  control.node.addEventListener('input', () => clearError(name));
  return control;
}

// --- Files ---------------------------------------------------------------------------------------

/** Take files that are dropped on an element. */
function acceptDrops(node, take) {
  const hasFiles = event => event.dataTransfer.types.includes('Files'); // and no text, which goes into fields
  node.addEventListener('dragover', event => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    node.classList.add('over');
  });
  for (const name of ['dragleave', 'drop']) node.addEventListener(name, () => node.classList.remove('over'));
  node.addEventListener('drop', event => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}

/** Return a file input that also takes drops, and shows what it holds. `changed` gets the file or null. */
function filePicker(name, accept, changed) {
  const input = make('input', { type: 'file', accept, id: `field-${name}` });
  const text = make('span', { className: 'hint', textContent: 'or drop it here' });
  const clear = make('button', { type: 'button', textContent: 'Remove', hidden: true, 'aria-label': `Remove: ${labelOf(name)}` });
  const label = make('label', { htmlFor: input.id }, 'Choose a file', make('span', { className: 'unseen', textContent: `: ${labelOf(name)}` }));
  const node = make('div', { className: 'pick drop' }, input, label, text, clear);
  const take = file => {
    text.textContent = file?.name ?? 'or drop it here';
    clear.hidden = !file;
    clearError(name);
    changed(file);
  };
  input.addEventListener('change', () => input.files.length && take(input.files[0]));
  clear.addEventListener('click', () => {
    input.value = '';
    take(null);
    input.focus();
  });
  acceptDrops(node, take);
  return { node, input, take, say: message => { text.textContent = message; } };
}

/** Files and images in metadata are hashes: say that such a one is to be chosen again. */
function writeFile(picker, value) {
  picker.take(null);
  if (isFileSummary(value)) picker.say(`the image had one (${value.sha256.slice(0, 8)}); choose it again`);
}

/** A file that is sent as it is: vectors, noise, or a depth map. */
function fileControl(name) {
  let held = null;
  const picker = filePicker(name, name === 'depth_map' ? 'image/*,.npy' : '.npy', file => { held = file; });
  return grouped(name, picker.input, [picker.node], {
    read: () => held ? dataUrl(held) : undefined,
    write: value => writeFile(picker, value),
  });
}

/** The image to start from or to change, with a view of it. */
function imageControl(name) {
  const view = make('img', { alt: '', hidden: true });
  let held = null;
  const picker = filePicker(name, 'image/png,image/jpeg,image/webp,image/bmp', async file => {
    if (control.url) URL.revokeObjectURL(control.url);
    Object.assign(control, { url: null, size: null });
    held = file;
    view.hidden = true;
    if (file) await show(file);
    if (held === file || !held) control.changed();
  });
  const show = async file => {
    control.url = URL.createObjectURL(file);
    view.src = control.url;
    const isShown = await view.decode().then(() => true, () => false);
    if (held !== file) return; // another was chosen meanwhile
    if (!isShown) {
      held = null;
      showError(new Refusal(`${file.name ?? 'This'} is not an image that this browser can show.`, { param: name }));
      return;
    }
    control.size = { width: view.naturalWidth, height: view.naturalHeight };
    view.alt = `${labelOf(name)}, ${view.naturalWidth} × ${view.naturalHeight} pixels`;
    view.hidden = page.controls.has('mask_image'); // the mask is painted over it
  };
  const control = grouped(name, picker.input, [picker.node, view], {
    read: () => held ? dataUrl(held) : undefined,
    write: value => writeFile(picker, value),
  });
  const release = () => control.url && URL.revokeObjectURL(control.url);
  return Object.assign(control, { take: picker.take, size: null, url: null, changed: imageChanged, release });
}

/** Bring what depends on the input image up to date: the mask over it, and the size if it is open. */
function imageChanged() {
  const { size, url } = page.controls.get('image');
  forgetReplaced('image');
  page.controls.get('mask_image')?.lieOver(size, url);
  followSize(page.model.size === 'open' && page.model.image !== 'embedding' && size ? size : page.model.defaults);
}

/** Show the size that the result has if no other is asked for, unless the user has chosen one. */
function followSize(size) {
  for (const side of ['width', 'height']) {
    const control = page.controls.get(side);
    if (!control) continue;
    if (control.read() === control.standard) control.target.value = size[side];
    control.standard = size[side];
  }
}

// --- Painting: masks and segmentation maps -------------------------------------------------------

/** A number for each pixel, painted with discs and rectangles, and shown by a palette. */
class Painting {
  constructor(canvas, palette) {
    Object.assign(this, { canvas, palette, width: 0, height: 0, ids: new Uint8Array(), past: [] });
  }

  /** Change the size, and keep what is painted where it is in proportion. */
  resize(width, height) {
    const old = { ...this };
    Object.assign(this, { width, height, ids: new Uint8Array(width * height), past: [] });
    Object.assign(this.canvas, { width, height });
    for (let index = 0; old.width && index < this.ids.length; index += 1) {
      const x = Math.floor((index % width) * old.width / width);
      const y = Math.floor(Math.floor(index / width) * old.height / height);
      this.ids[index] = old.ids[y * old.width + x];
    }
    this.render();
  }

  /** Keep what is painted for an undo. */
  remember() {
    this.past = [...this.past.slice(-19), this.ids.slice()];
  }

  undo() {
    this.ids = this.past.pop() ?? this.ids;
    this.render();
  }

  /** Paint a rectangle, in whole pixels. */
  rectangle(left, top, width, height, value) {
    const from = clamp(left, 0, this.width), to = clamp(left + width, 0, this.width);
    for (let y = clamp(top, 0, this.height); y < clamp(top + height, 0, this.height); y += 1) {
      this.ids.fill(value, y * this.width + from, y * this.width + to);
    }
  }

  clear() {
    this.ids.fill(0);
    this.past = [];
    this.render();
  }

  disc(x, y, radius, value) {
    for (let row = Math.ceil(y - radius); row <= y + radius; row += 1) {
      const half = Math.sqrt(Math.max(radius ** 2 - (row - y) ** 2, 0));
      this.rectangle(Math.round(x - half), row, Math.max(1, Math.round(2 * half)), 1, value);
    }
  }

  /** Paint from one point to another, [x, y], with a disc. */
  line(from, to, radius, value) {
    const count = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / Math.max(radius / 2, 1));
    for (let index = 0; index <= count; index += 1) {
      const share = count ? index / count : 0;
      this.disc(from[0] + share * (to[0] - from[0]), from[1] + share * (to[1] - from[1]), radius, value);
    }
    this.render();
  }

  render() {
    if (!this.width) return;
    const pixels = new Uint32Array(this.ids.length);
    for (let index = 0; index < pixels.length; index += 1) pixels[index] = this.palette[this.ids[index]];
    const image = new ImageData(new Uint8ClampedArray(pixels.buffer), this.width, this.height);
    this.canvas.getContext('2d').putImageData(image, 0, 0);
  }

  /** Return the numbers at another size, each times a factor, as a data: URL of a PNG. */
  png({ width, height } = this, factor = 1) {
    const pixels = new Uint8Array(width * height);
    for (let y = 0, index = 0; y < height; y += 1) {
      const row = Math.floor(y * this.height / height) * this.width;
      for (let x = 0; x < width; x += 1, index += 1) pixels[index] = factor * this.ids[row + Math.floor(x * this.width / width)];
    }
    return grayPng(pixels, width, height);
  }
}

/** Return a data: URL of a gray PNG of 8 bits, which a canvas cannot write. */
async function grayPng(pixels, width, height) {
  const rows = new Uint8Array(height * (width + 1)); // each begins with its filter, none
  for (let y = 0; y < height; y += 1) rows.set(pixels.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream('deflate'));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8);
  const chunks = [['IHDR', header.buffer], ['IDAT', await new Response(packed).arrayBuffer()], ['IEND', new ArrayBuffer()]];
  const parts = chunks.map(([type, body]) => pngChunk(type, new Uint8Array(body)));
  return dataUrl(new Blob([PNG_SIGNATURE, ...parts], { type: 'image/png' }));
}

const PNG_SIGNATURE = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit += 1) byte = byte & 1 ? 0xedb88320 ^ (byte >>> 1) : byte >>> 1;
  return byte;
});

/** Return a chunk of a PNG: length, type, body and checksum. */
function pngChunk(type, body) {
  const chunk = new Uint8Array(body.length + 12);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, body.length);
  chunk.set(new TextEncoder().encode(type), 4);
  chunk.set(body, 8);
  const crc = chunk.subarray(4, -4).reduce((sum, byte) => CRC_TABLE[(sum ^ byte) & FULL] ^ (sum >>> 8), 0xffffffff);
  view.setUint32(body.length + 8, ~crc >>> 0);
  return chunk;
}

/** Return red, green and blue for a class; neighbours in number are far apart in hue. */
function classColor(number) {
  const hue = (number * 137.5) % 360, light = number % 3 === 2 ? 0.4 : 0.6;
  const channel = shift => {
    const place = (shift + hue / 30) % 12;
    return Math.round(FULL * (light - 0.3 * Math.max(-1, Math.min(place - 3, 9 - place, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

/** Return a colour as a pixel of a canvas: four bytes in the order of the machine. */
function pixel(red, green, blue, alpha) {
  return new Uint32Array(new Uint8Array([red, green, blue, alpha]).buffer)[0];
}

/** Return a canvas to paint on with its tools. `chooser` says with which value, `describe` what is painted. */
function paintBox(name, chooser, palette, describe) {
  const canvas = make('canvas', { role: 'img' });
  const painting = new Painting(canvas, palette);
  chooser.input.setAttribute('aria-label', 'Paint'); // without the names of all classes
  const size = make('input', { type: 'range', min: 1, max: 100, value: 20, 'aria-label': 'Brush size in percent of the width' });
  const changed = () => canvas.setAttribute('aria-label', `${labelOf(name)}: ${describe(painting)}`);
  const button = (text, act) => {
    const node = make('button', { type: 'button', textContent: text });
    node.addEventListener('click', () => { act(); painting.render(); changed(); });
    return node;
  };
  const fill = (...sides) => {
    painting.remember();
    const pixels = sides.map((percent, index) => Math.round(percent / 100 * (index % 2 ? painting.height : painting.width)));
    painting.rectangle(...pixels, chooser.read());
  };
  const tools = make('div', { className: 'row' },
    make('label', {}, 'Paint ', chooser.input), make('label', {}, 'Brush ', size),
    button('Undo', () => painting.undo()), button('Fill all', () => fill(0, 0, 100, 100)));
  const node = make('div', { className: 'paint' }, tools, make('div', { className: 'board' }, canvas), rectangleForm(fill, button));
  paintByPointer(canvas, painting, () => [size.value / 200 * painting.width, chooser.read()], changed);
  return { node, canvas, painting, changed };
}

/** Let a drag on the canvas paint; `brush` gives radius and value. */
function paintByPointer(canvas, painting, brush, ended) {
  let last = null;
  const place = event => [event.offsetX * painting.width / canvas.clientWidth, event.offsetY * painting.height / canvas.clientHeight];
  canvas.addEventListener('pointerdown', event => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    painting.remember();
    last = place(event);
    painting.line(last, last, ...brush());
  });
  canvas.addEventListener('pointermove', event => {
    if (!last) return;
    painting.line(last, place(event), ...brush());
    last = place(event);
  });
  for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, () => { last = null; ended(); });
}

/** Return the way to paint without a pointer: a rectangle by its numbers. */
function rectangleForm(fill, button) {
  const sides = { Left: 25, Top: 25, Width: 50, Height: 50 };
  const inputs = Object.values(sides).map(value => make('input', { type: 'number', min: 0, max: 100, value }));
  const fields = Object.keys(sides).map((text, index) => make('label', {}, `${text} %`, inputs[index]));
  const act = button('Fill rectangle', () => fill(...inputs.map(input => Number(input.value))));
  const numbers = make('div', { className: 'numbers' }, ...fields, act);
  return make('details', {}, make('summary', { textContent: 'Paint a rectangle by numbers' }), numbers);
}

/** Return how large something is to be painted so that it stays quick, in the proportions of an image. */
function paintedSize({ width, height }) {
  const scale = Math.min(1, MOST_PAINTED / Math.max(width, height));
  return [Math.round(width * scale), Math.round(height * scale)];
}

/** The part of the image that is generated again, painted over the image. */
function maskControl(name) {
  const options = [[1, 'what changes'], [0, 'what stays']];
  const input = make('select', {}, ...options.map(([value, textContent]) => make('option', { value, textContent })));
  const chooser = { input, read: () => Number(input.value) };
  const box = paintBox(name, chooser, [0, pixel(214, 40, 110, 150)], ({ ids }) => `${percentOf(1, ids)} changes`);
  const under = make('img', { alt: '' });
  box.canvas.before(under);
  const empty = make('p', { className: 'hint', textContent: 'Choose the image first, then paint over what is to change.' });
  box.node.hidden = true;
  const control = grouped(name, input, [empty, box.node], {
    read: () => box.painting.ids.some(Boolean) ? box.painting.png(control.size, FULL) : undefined,
    write: () => { box.painting.clear(); box.changed(); },
  });
  control.lieOver = (size, url) => {
    control.size = size;
    box.node.hidden = !size;
    empty.hidden = Boolean(size);
    if (url) under.src = url;
    box.painting.clear();
    box.painting.resize(...(size ? paintedSize(size) : [0, 0]));
    box.changed();
  };
  return control;
}

/** Return how much of the pixels have a value. */
function percentOf(value, ids) {
  const count = ids.reduce((sum, id) => sum + (id === value), 0);
  return `${Math.round(100 * count / Math.max(ids.length, 1))} %`;
}

/** The class of every pixel: painted, or from a file. */
function segmentationControl(name) {
  const chooser = classChooser();
  chooser.write(Math.min(1, page.model.classes - 1));
  const brush = { input: chooser.input, read: () => clamp(Number(chooser.read()) || 0, 0, page.model.classes - 1) };
  const legend = make('ul', { className: 'legend' });
  const palette = Array.from({ length: 256 }, (_, number) => pixel(...classColor(number), FULL));
  const box = paintBox(name, brush, palette, ({ ids }) => showLegend(legend, ids));
  box.canvas.parentNode.after(legend);
  let upload = null;
  const view = make('img', { alt: 'The chosen segmentation map', hidden: true });
  const picker = filePicker(name, 'image/png', async file => {
    upload = file;
    box.node.hidden = Boolean(file);
    view.hidden = !file;
    if (view.src) URL.revokeObjectURL(view.src);
    view.removeAttribute('src');
    if (!file) return followSize(box.painting);
    view.src = URL.createObjectURL(file);
    const isShown = await view.decode().then(() => true, () => false);
    if (upload !== file) return; // another was chosen meanwhile
    if (!isShown) showError(new Refusal(`${file.name} is not a PNG that this browser can show.`, { param: name }));
    if (view.naturalWidth) followSize({ width: view.naturalWidth, height: view.naturalHeight });
  });
  const control = grouped(name, picker.input, [box.node, picker.node, view], {
    read: () => upload ? dataUrl(upload) : box.painting.png(),
    write: value => writeFile(picker, value),
  });
  control.release = () => view.src && URL.revokeObjectURL(view.src);
  control.resize = (width, height) => {
    if (upload || !width || !height) return;
    box.painting.resize(width, height);
    box.changed();
    followSize({ width, height });
  };
  return control;
}

/** List the classes that a map has in their colours, and return the list in words. */
function showLegend(legend, ids) {
  const entries = [...new Set(ids)].sort((one, other) => one - other).map(number => {
    const swatch = make('span', { className: 'swatch' });
    swatch.style.background = `rgb(${classColor(number).join()})`;
    const text = `${page.model.labels[number] ?? `class ${number}`}, ${percentOf(number, ids)}`;
    return { text, node: make('li', {}, swatch, text) };
  });
  legend.replaceChildren(...entries.map(({ node }) => node));
  return entries.map(({ text }) => text).join('; ');
}

// --- Layouts -------------------------------------------------------------------------------------

/** Objects with boxes: dragged on a canvas, or written as numbers in a list. */
function layoutControl(name) {
  const canvas = make('canvas', { role: 'img' });
  const list = make('ol', { className: 'boxes' });
  const add = make('button', { type: 'button', textContent: 'Add a box' });
  const most = page.model.max_objects;
  let rows = [];
  const changed = () => {
    rows.forEach((row, index) => row.number(index + 1));
    add.disabled = rows.length >= most;
    canvas.setAttribute('aria-label', `${rows.length} of at most ${most} boxes`);
    paintBoxes(canvas, rows.map(row => row.read()));
  };
  const addRow = object => {
    const row = boxRow(object, changed, () => {
      rows = rows.filter(each => each !== row);
      row.node.remove();
      changed();
      add.focus();
    });
    rows.push(row);
    list.append(row.node);
    changed();
    return row;
  };
  const addBox = box => rows.length < most ? addRow({ label: rows.at(-1)?.read().label ?? 0, box }) : null;
  add.addEventListener('click', () => {
    const edge = 0.1 + rows.length % 4 * 0.1;
    addBox([edge, edge, edge + 0.5, edge + 0.5]).node.querySelector('input, select').focus();
  });
  dragBoxes(canvas, () => rows, addBox, changed);
  const hint = `Drag on the board for a new box, or drag a box to move it. Edges are shares of the image, from 0 to 1; at most ${most} boxes.`;
  const control = grouped(name, add, [make('div', { className: 'board' }, canvas), list, add], {
    hint,
    read: () => rows.map(row => row.read()),
    write: value => {
      rows = [];
      list.replaceChildren();
      (value ?? []).forEach(addRow);
      changed();
    },
  });
  control.resize = (width, height) => {
    Object.assign(canvas, { width: 480, height: Math.round(480 * height / width) || 480 });
    changed();
  };
  return control;
}

/** Return the line of a box in the list, with its label and its edges. */
function boxRow(object, changed, remove) {
  const chooser = classChooser('Label');
  chooser.write(object.label);
  const names = ['Left', 'Top', 'Right', 'Bottom'];
  const edges = names.map((_, index) => make('input', { type: 'number', min: 0, max: 1, step: 0.01, value: round2(object.box[index]) }));
  const away = make('button', { type: 'button', textContent: '✕', title: 'Remove' });
  away.addEventListener('click', remove);
  const fields = edges.map((each, index) => make('label', {}, names[index], each));
  const node = make('li', {}, make('div', { className: 'row' }, chooser.input, away), make('div', { className: 'numbers' }, ...fields));
  node.addEventListener('input', changed);
  return {
    node,
    number: number => {
      chooser.input.setAttribute('aria-label', `Label of box ${number}`);
      away.setAttribute('aria-label', `Remove box ${number}`);
      edges.forEach((each, index) => each.setAttribute('aria-label', `${names[index]} edge of box ${number}`));
    },
    read: () => ({ label: chooser.read(), box: edges.map(each => Number(each.value)) }),
    writeBox: box => edges.forEach((each, index) => { each.value = round2(box[index]); }),
  };
}

const round2 = value => Math.round(value * 100) / 100;

/** Let a drag on the canvas move the box under it, or add one. */
function dragBoxes(canvas, rowsNow, addBox, changed) {
  let start = null, row = null, old = null;
  const place = event => [event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight].map(each => clamp(each, 0, 1));
  const isInside = ([x, y], [left, top, right, bottom]) => left <= x && x <= right && top <= y && y <= bottom;
  canvas.addEventListener('pointerdown', event => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    start = place(event);
    row = rowsNow().findLast(each => isInside(start, each.read().box)) ?? null;
    old = row?.read().box;
  });
  canvas.addEventListener('pointermove', event => {
    if (!start) return;
    const end = place(event);
    const box = old ? movedBox(old, start, end) : boxBetween(start, end);
    if (!row && box[2] - box[0] > 0.02 && box[3] - box[1] > 0.02) row = addBox(box);
    row?.writeBox(box);
    changed();
  });
  for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, () => { start = row = old = null; });
}

/** Return the box of two opposite corners: left, top, right, bottom. */
function boxBetween(one, other) {
  return [...one.map((each, axis) => Math.min(each, other[axis])), ...one.map((each, axis) => Math.max(each, other[axis]))];
}

/** Return a box that is moved as the pointer was, and no further than the edge of the image. */
function movedBox(box, start, end) {
  const shift = [0, 1].map(axis => clamp(end[axis] - start[axis], -box[axis], 1 - box[axis + 2]));
  return box.map((each, index) => each + shift[index % 2]);
}

/** Show boxes in the colours of their labels, with their names. */
function paintBoxes(canvas, objects) {
  const context = canvas.getContext('2d');
  const text = getComputedStyle(canvas).color;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.font = '16px system-ui, sans-serif';
  context.lineWidth = 3;
  for (const { label, box } of objects) {
    const [left, top, right, bottom] = box.map((edge, index) => edge * (index % 2 ? canvas.height : canvas.width));
    const color = classColor(Number(label) || 0).join();
    context.fillStyle = `rgba(${color}, 0.25)`;
    context.fillRect(left, top, right - left, bottom - top);
    context.strokeStyle = `rgb(${color})`;
    context.strokeRect(left, top, right - left, bottom - top);
    context.fillStyle = text;
    context.fillText(page.model.labels[label] ?? label ?? '', left + 7, top + 20);
  }
}

// --- The form ------------------------------------------------------------------------------------

const SPECIAL = {
  prompt: name => textControl(name, { rows: 3, placeholder: needs(name) ? EXAMPLES[page.model.task] ?? EXAMPLE : 'optional' }),
  negative_prompt: name => textControl(name, { rows: 1, placeholder: 'what to steer away from' }),
  class_label: classControl, layout: layoutControl, segmentation: segmentationControl, image: imageControl,
  mask_image: maskControl, depth_map: fileControl, embeddings: fileControl, latents: fileControl,
  seed: seedControl, variation_seed: seedControl, adapters: adaptersControl,
};

/** Return whether a request to the model must have a field, or one in its place. */
const needs = name => page.model.needs.some(group => group.includes(name));

/** Return the control of a field: one of its own, or what its type in the schema asks for. */
function makeControl(name) {
  if (name in SPECIAL) return SPECIAL[name](name);
  const kind = kindOf(name);
  if (kind.enum) return selectControl(name, kind.enum);
  if (kind.type === 'boolean') return checkControl(name);
  if (kind.type === 'array') return listControl(name);
  return kind.type === 'string' ? textControl(name) : numberControl(name, kind);
}

/** Build the form of a model; values of fields that it shares with the last one stay. */
async function showModel(model) {
  const kept = [...page.controls.values()].filter(each => !FILE_FIELDS.has(each.name)).map(each => [each.name, valueOrNothing(each)]);
  for (const control of page.controls.values()) control.release?.();
  page.model = model;
  page.controls = new Map();
  page.restored = new Set();
  page.typed = new Set();
  const takes = name => model.takes.includes(name) && !(model.size === 'enlarged' && ['width', 'height'].includes(name));
  const needsImage = needs('image');
  const start = START.filter(takes);
  place($('inputs'), [...INPUTS.filter(takes), ...(needsImage ? start : [])]);
  place($('start').lastElementChild, needsImage ? [] : start);
  place($('basics'), BASICS.filter(takes));
  place($('adapters'), model.adapters.length ? ['adapters'] : []);
  const placed = new Set([...INPUTS, ...START, ...BASICS]);
  place($('more').lastElementChild, Object.keys(page.properties).filter(name => takes(name) && !placed.has(name)));
  $('start').hidden = needsImage || !start.length;
  $('more').hidden = !$('more').lastElementChild.children.length;
  for (const [name, value] of kept) if (value !== undefined) page.controls.get(name)?.write(value);
  sizeChanged();
  $('onward').hidden = !page.controls.has('image');
}

/** Return what a control holds, if it is not its default and can be read. */
function valueOrNothing(control) {
  try {
    const value = control.read();
    return value === control.standard ? undefined : value;
  } catch {
    return undefined;
  }
}

/** Make the controls of some fields in an element. */
function place(node, names) {
  const controls = names.map(makeControl);
  for (const control of controls) page.controls.set(control.name, control);
  node.replaceChildren(...controls.map(each => each.node));
}

/** Fit the boards of layouts and maps to the size of the image. */
function sizeChanged() {
  const [width, height] = ['width', 'height'].map(side => Number(page.controls.get(side)?.target.value));
  for (const name of ['layout', 'segmentation']) page.controls.get(name)?.resize(width, height);
}

/** Offer the models, if there are several. */
function showModels() {
  if (page.models.length < 2) return;
  const options = page.models.map(({ name, task }) => make('option', { value: name, textContent: `${name} (${task})` }));
  const select = make('select', { id: 'field-model' }, ...options);
  select.addEventListener('change', () => showModel(page.models.find(each => each.name === select.value)));
  $('model').replaceChildren(make('label', { htmlFor: select.id, textContent: 'Model' }), select);
}

/** Return the fields of the request that the form describes, without those at their defaults. */
async function collect() {
  const prompt = page.controls.get('prompt');
  if (needs('prompt') && !prompt.read()) prompt.write(prompt.target.placeholder);
  const hasPreset = Boolean(page.controls.get('preset')?.read()); // has defaults of its own
  const { restored, typed } = page;
  // All at once: while files are read, the form may change, and even be another model's.
  const fields = [...page.controls.values()].map(async ({ name, read, standard }) => {
    const value = await read();
    const isDefault = value === standard && !(hasPreset && (restored.has(name) || typed.has(name)));
    return value === undefined || isDefault ? [] : [[name, value]];
  });
  return Object.fromEntries((await Promise.all(fields)).flat());
}

/** Put the settings of an image into the form; `ours` says that files in the form may be those it was made with. */
async function restore({ request, bundle_sha256: sha256, adapters = [] }, name, { ours = false } = {}) {
  const model = page.models.find(each => each.bundle_sha256 === sha256);
  const keepsFiles = ours && model === page.model;
  if (model && model !== page.model) {
    await showModel(model);
    if ($('field-model')) $('field-model').value = model.name;
  }
  clearErrors();
  const files = Object.keys(request).filter(each => isFileSummary(request[each]) && page.controls.has(each));
  const fields = { ...request, adapters: adaptersHere(adapters) };
  for (const control of page.controls.values()) {
    if (!keepsFiles || !files.includes(control.name)) control.write(fields[control.name] ?? undefined);
  }
  page.restored = new Set(Object.keys(request));
  page.typed = new Set();
  sizeChanged();
  const other = model ? '' : ' Another model made it, so that the result may differ.';
  const left = files.length ? ` ${keepsFiles ? 'These stay as they are' : 'Choose again'}: ${files.map(labelOf).join(', ')}.` : '';
  const lacking = adapters.length - fields.adapters.length;
  const without = lacking ? ` ${lacking} of its adapters ${lacking === 1 ? 'is' : 'are'} not here.` : '';
  announce(`Restored the settings of ${name}.${other}${left}${without}`);
}

/** Return the adapters of an image's metadata that the model has, by its names for them. */
function adaptersHere(recorded) {
  const found = recorded.map(({ sha256, scale }) => ({ ...page.model.adapters.find(each => each.sha256 === sha256), scale }));
  return found.filter(each => each.name);
}

/** Clear restored settings that a change of another one leaves without a meaning. */
function forgetReplaced(name) {
  const forget = each => page.restored.delete(each) && page.controls.get(each)?.write(undefined);
  page.restored.delete(name);
  for (const each of REPLACED[name] ?? []) forget(each);
  const isCustom = page.controls.get('schedule')?.read() === 'custom';
  if (isCustom && !page.controls.get('sigmas').read()) forget('schedule');
}

// --- Errors and progress -------------------------------------------------------------------------

/** Take all errors away. */
function clearErrors() {
  $('problem').textContent = '';
  for (const name of page.controls.keys()) clearError(name);
}

/** Take the error of a field away. */
function clearError(name) {
  const target = page.controls.get(name)?.target;
  if (!target?.hasAttribute('aria-invalid')) return;
  target.removeAttribute('aria-invalid');
  $(`error-${name}`).hidden = true;
  if ($(`hint-${name}`)) target.setAttribute('aria-describedby', `hint-${name}`);
  else target.removeAttribute('aria-describedby');
}

/** Show an error next to the field that is to blame, or above the buttons. */
function showError(error) {
  if (error.status === 401) return askForKey();
  const message = error instanceof Refusal ? error.message : `The server cannot be reached (${error.message}). Is it running?`;
  const name = (error.param ?? '').replace(/^request\./, '').split(/[.[]/)[0];
  const control = page.controls.get(name);
  if (!control) {
    $('problem').textContent = message;
    return;
  }
  const note = $(`error-${name}`);
  note.textContent = message.startsWith(`${name}: `) ? capital(message.slice(name.length + 2)) : capital(message);
  note.hidden = false;
  control.target.setAttribute('aria-invalid', 'true');
  control.target.setAttribute('aria-describedby', [`error-${name}`, $(`hint-${name}`)?.id].filter(Boolean).join(' '));
  const details = control.node.closest('details');
  if (details) details.open = true;
  control.target.focus();
}

/** Show the field for a key, after the server has refused. */
function askForKey() {
  $('access').hidden = false;
  $('about').textContent = 'Needs a key';
  if (page.key) $('problem').textContent = 'The server does not know this key.';
  $('key').focus();
}

/** Say something to the eye. */
function say(text) {
  $('status').textContent = text;
}

/** Say something to the eye and to screen readers. */
function announce(text) {
  say(text);
  $('announcer').textContent = text;
}

/** Show that a job runs, or that none does. */
function setRunning(isRunning) {
  page.isRunning = isRunning;
  $('generate').setAttribute('aria-disabled', isRunning); // not disabled, which would lose the focus
  if (!isRunning && document.activeElement === $('cancel')) $('generate').focus();
  $('cancel').hidden = !isRunning;
  $('progress').hidden = !isRunning;
  $('result').setAttribute('aria-busy', isRunning);
  if (!isRunning) document.title = 'ldm';
}

/** Show how far a job is, and its preview. */
function showProgress(job) {
  const percent = Math.round(100 * job.progress);
  $('progress').setAttribute('aria-valuenow', percent);
  $('progress').setAttribute('aria-valuetext', progressText(job));
  $('progress').firstElementChild.style.width = `${percent}%`;
  document.title = `${percent} % – ldm`;
  say(progressText(job));
  const quarter = `${job.state === 'queued' ? progressText(job) : `${Math.floor(percent / 25) * 25} % done`}`;
  if ($('announcer').textContent !== quarter) $('announcer').textContent = quarter;
  if (job.preview) showImage(job.preview, 'Preview of the image so far', job);
}

/** Return how far a job is in words. */
function progressText(job) {
  if (job.state === 'queued') return job.queue_position ? `Waiting: ${job.queue_position} before yours.` : 'Waiting: yours is next.';
  const total = job.total_steps * job.steps.length, done = job.steps.reduce((sum, each) => sum + each, 0);
  if (!total) return 'Starting…';
  return done < total ? `Step ${done} of ${total}` : 'Decoding…';
}

/** Show an image or a preview, at the size that the image has. */
function showImage(source, alt, { width, height }) {
  Object.assign($('shown'), { src: source, alt, width, height, hidden: false });
  $('empty').hidden = true;
  $('frame').hidden = false;
}

// --- Generating ----------------------------------------------------------------------------------

/** Generate what the form asks for, and show it. */
async function generate() {
  if (page.isRunning || !page.model) return;
  clearErrors();
  page.retry = generate;
  page.isCancelled = false;
  setRunning(true);
  say('Sending…');
  if (matchMedia('(width < 56rem)').matches) $('result').scrollIntoView();
  const { model } = page; // another may be chosen meanwhile
  try {
    const request = await collect();
    page.job = await submit(request, model);
    if (page.isCancelled) await cancel();
    const job = await follow(page.job);
    if (job.state === 'failed') throw new Refusal(job.error.message, job.error);
    if (job.state === 'completed') await keepResults(job, request, model);
    if (job.state === 'cancelled') ended('Cancelled.');
  } catch (error) {
    if (page.model !== model) error.param = null; // the field of that name is another model's
    setRunning(false);
    const isUnheard = page.job && !(error instanceof Refusal);
    ended(page.isCancelled ? `Cancelled.${isUnheard ? ' The server may not have heard it.' : ''}` : '');
    if (!page.isCancelled) showError(error);
  } finally {
    page.job = null;
    setRunning(false);
  }
}

/** End without an image: the last result, or nothing, is shown again. */
function ended(text) {
  if (page.shown) showResult(page.shown);
  else [$('shown').hidden, $('empty').hidden] = [true, false];
  announce(text);
}

/** End the job, or the one that is about to be queued. */
async function cancel() {
  page.isCancelled = true;
  if (page.job) await call(`/api/jobs/${page.job.id}/cancel`, { method: 'POST' }).catch(() => {}); // it may be over
}

/** Fetch the images of a job, since the server forgets them, and show the first. */
async function keepResults(job, request, model) {
  const results = await Promise.all(job.images.map(async ({ url, seed, metadata }) => {
    const blob = await persist(async () => (await call(url)).blob());
    const { width, height, timings: { total: seconds } } = job;
    const fields = fieldsAlone(request, metadata.request);
    return { url: URL.createObjectURL(blob), blob, seed, metadata, fields, model, width, height, seconds };
  }));
  page.results.unshift(...results);
  for (const old of page.results.splice(MOST_KEPT)) if (old !== page.pinned) URL.revokeObjectURL(old.url);
  $('last-seed')?.removeAttribute('disabled');
  showResult(results[0]);
  showHistory();
  $('announcer').textContent = `Done: ${results.length === 1 ? 'one image' : `${results.length} images`}.`;
}

/** Return the request of one image of several: it is the same alone, with its own seeds. */
function fieldsAlone({ num_images: _, ...fields }, { seed, variation_seed: variation }) {
  return { ...fields, ...(seed === null ? {} : { seed }), ...(variation === null ? {} : { variation_seed: variation }) };
}

// --- Results -------------------------------------------------------------------------------------

/** Return what an image is of, in words. */
function titleOf({ metadata: { request }, seed, model }) {
  const label = request.class_label;
  const subject = request.prompt || (label === null ? model.task : `class ${model.labels[label] ?? label}`);
  return request.sampler ? `${subject}, seed ${seed}` : subject;
}

/** Show a result with its tools. */
function showResult(result) {
  page.shown = result;
  const { request } = result.metadata;
  showImage(result.url, titleOf(result), result);
  const parts = [`${result.width} × ${result.height}`];
  if (request.sampler) parts.unshift(`Seed ${result.seed}`, `${request.num_inference_steps} steps`, request.sampler);
  say([...parts, `${result.seconds.toFixed(1)} s`].join(' · '));
  $('tools').hidden = false;
  Object.assign($('save'), { href: result.url, download: `${result.model.name}-${result.seed}.png` });
  $('pin').setAttribute('aria-pressed', page.pinned !== null);
  for (const [index, button] of [...$('history').querySelectorAll('button')].entries()) {
    button.setAttribute('aria-pressed', page.results[index] === result);
  }
  showComparison();
}

/** Show all results as small images, the latest first. */
function showHistory() {
  $('past').hidden = false;
  $('history').replaceChildren(...page.results.map(result => {
    const image = make('img', { src: result.url, alt: titleOf(result) });
    const button = make('button', { type: 'button', 'aria-pressed': result === page.shown }, image);
    button.addEventListener('click', () => showResult(result));
    return make('li', {}, button);
  }));
}

/** Show the pinned result and the shown one side by side, with the settings in which they differ. */
function showComparison() {
  const pair = [page.pinned, page.shown];
  $('comparison').hidden = !page.pinned || page.pinned === page.shown;
  $('frame').hidden = !$('comparison').hidden; // which has the image already
  if ($('comparison').hidden) return;
  const figures = $('comparison').querySelectorAll('figure');
  pair.forEach((result, index) => figures[index].replaceChildren(
    make('img', { src: result.url, alt: titleOf(result) }), make('figcaption', { textContent: `${index ? 'Second' : 'First'}: seed ${result.seed}` })));
  const [first, second] = pair.map(({ metadata: { request, adapters = [] }, model }) =>
    ({ model: model.name, ...request, adapters: adapters.map(each => `${each.name} ${each.scale}`).join(', ') }));
  const names = Object.keys(first).filter(name => toJson(first[name]) !== toJson(second[name]));
  const cell = value => make('td', { textContent: settingText(value) });
  $('comparison').querySelector('tbody').replaceChildren(...names.map(name =>
    make('tr', {}, make('th', { scope: 'row', textContent: labelOf(name) }), cell(first[name]), cell(second[name]))));
}

/** Return the value of a setting as text; a file is the beginning of its hash. */
function settingText(value) {
  if (isFileSummary(value)) return value.sha256.slice(0, 8);
  return typeof value === 'string' ? value : toJson(value ?? null);
}

/** Begin to compare the shown image with others, or end that. */
function pin() {
  page.pinned = page.pinned ? null : page.shown;
  showResult(page.shown);
  announce(page.pinned ? 'Choose or generate another image to compare with this one.' : 'The comparison has ended.');
}

// --- Code to copy --------------------------------------------------------------------------------

/** Return commands that generate an image again; the body is a here-document, since images are long. */
function curlText({ fields, model }) {
  const key = page.key ? ' -H "Authorization: Bearer $LDM_KEY"' : '';
  return `URL=${location.origin}
JOB=$(curl -s $URL/api/jobs -H 'Content-Type: application/json'${key} -d @- <<'END' | sed 's/^{"id":"\\([^"]*\\)".*/\\1/'
${toJson(bodyOf(fields, model))}
END
)
curl -sN $URL/api/jobs/$JOB/events${key} > /dev/null  # returns when the job is over
curl -s $URL/files/$JOB/0 -o image.png
`;
}

const PYTHON_NAMES = new Map([[true, 'True'], [false, 'False'], [null, 'None']]);

/** Return a program that generates an image again from the folder of its bundle. */
function pythonText({ fields: { adapters: _, ...fields }, metadata: { adapters = [] }, model }) {
  const files = Object.fromEntries(adapters.map(({ name, scale }) => [name, scale]));
  const more = adapters.length ? `, adapters=${pythonLiteral(files)}` : '';
  const lines = Object.entries(fields).map(([name, value]) => `        ${name}=${pythonLiteral(value)},\n`);
  return `from ldm_runtime import Generator

with Generator(${pythonLiteral(model.name)}${more}) as generator:  # the folder of the bundle
    result = generator(
${lines.join('')}    )
result.save("image.png")
`;
}

/** Return a value in Python's words; JSON has the same numbers and texts. */
function pythonLiteral(value) {
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(', ')}]`;
  if (value !== null && typeof value === 'object') {
    return `{${Object.entries(value).map(pair => pair.map(pythonLiteral).join(': ')).join(', ')}}`;
  }
  return PYTHON_NAMES.get(value) ?? toJson(value);
}

/** Copy a text, or show it where the browser does not let pages copy. */
async function copy(text, name) {
  try {
    await navigator.clipboard.writeText(text);
    announce(`Copied as ${name}.`);
  } catch {
    $('snippet-text').value = text;
    $('snippet').showModal();
    $('snippet-text').select();
  }
}

// --- Restoring from a PNG ------------------------------------------------------------------------

/** Return the metadata that ldm wrote into a PNG: JSON in an iTXt chunk, not compressed. */
async function metadataOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const keyword = new TextEncoder().encode('iTXtldm-deploy\0\0');
  if (PNG_SIGNATURE.some((byte, index) => bytes[index] !== byte)) throw new Refusal(`${file.name} is not a PNG.`);
  for (let at = PNG_SIGNATURE.length; at + 12 <= bytes.length; at += view.getUint32(at) + 12) {
    if (keyword.some((byte, index) => bytes[at + 4 + index] !== byte)) continue;
    const body = bytes.subarray(at + 4 + keyword.length + 1, at + 8 + view.getUint32(at)); // behind the compression method
    const language = body.indexOf(0), translated = body.indexOf(0, language + 1);
    return parseJson(new TextDecoder().decode(body.subarray(translated + 1)));
  }
  throw new Refusal(`${file.name} carries no settings of ldm.`);
}

/** Restore the settings of a PNG that was chosen or dropped. */
async function restoreFile(file) {
  $('problem').textContent = '';
  try {
    await restore(await metadataOf(file), file.name);
  } catch (error) {
    $('problem').textContent = error instanceof Refusal ? error.message : `${file.name} is damaged: ${error.message}`;
  }
}

// --- Start ---------------------------------------------------------------------------------------

/** Ask the server what it has, and show the form. */
async function load() {
  page.retry = load;
  try {
    const [{ models }, { limits, request_schema: schema }] = await Promise.all([getJson('/api/models'), getJson('/api/capabilities')]);
    Object.assign(page, { models, limits, properties: schema.$defs.GenerationRequest.properties });
    showModels();
    await showModel(models[0]);
    $('about').textContent = models.length > 1 ? `${models.length} models` : `${models[0].name} · ${models[0].task}`;
    $('generate').disabled = false;
  } catch (error) {
    showError(error);
  }
}

/** Take the key that was typed, and do again what was refused. */
function useKey() {
  page.key = $('key').value.trim();
  $('problem').textContent = '';
  $('access').hidden = true;
  page.retry();
}

/** Connect the elements of the page with what they do. */
function listen() {
  const clicks = {
    'use-key': useKey, cancel, pin, again: () => restore(page.shown.metadata, 'this image', { ours: true }),
    onward: () => {
      $('start').open = true;
      page.controls.get('image').take(new File([page.shown.blob], `seed ${page.shown.seed}.png`, { type: 'image/png' }));
    },
    'copy-curl': () => copy(curlText(page.shown), 'curl'), 'copy-python': () => copy(pythonText(page.shown), 'Python'),
  };
  for (const [id, act] of Object.entries(clicks)) $(id).addEventListener('click', act);
  $('form').addEventListener('submit', event => { event.preventDefault(); generate(); });
  $('form').addEventListener('change', event => {
    const name = event.target.id.replace(/^field-/, '');
    forgetReplaced(name);
    if (name === 'preset') page.typed.clear(); // its own settings are wanted
    page.typed.add(name);
  });
  $('basics').addEventListener('change', sizeChanged);
  $('key').addEventListener('keydown', event => { if (event.key === 'Enter') { event.preventDefault(); useKey(); } });
  $('form').addEventListener('input', event => clearError(event.target.id.replace(/^field-/, '')));
  document.addEventListener('keydown', event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
  });
  $('restore').addEventListener('change', () => { restoreFile($('restore').files[0]); $('restore').value = ''; });
  acceptDrops(document.documentElement, restoreFile);
  addEventListener('pagehide', () => page.job && call(`/api/jobs/${page.job.id}/cancel`, { method: 'POST', keepalive: true }));
}

listen();
load();
