// Shows the picture of a map, and reports what hand and keyboard do. Python draws the picture.
const HELP =
  'Drag to pan, wheel or + and - to zoom, arrow keys to pan, 0 for the whole, ' +
  'Enter to choose the point at the cross, drag with Shift for a lasso.';
const SVG = 'http://www.w3.org/2000/svg';
const MOST_ZOOM = 16;

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

// Place of a pointer in the plot, as shares of what is seen: right, and up.
function placeOf(event, pad, plot) {
  const [left, top, width, height, whole] = plot;
  const rect = pad.getBoundingClientRect();
  const scale = rect.width / whole;
  const x = ((event.clientX - rect.left) / scale - left) / width;
  const y = 1 - ((event.clientY - rect.top) / scale - top) / height;
  return [x, y];
}

function render({ model, el }) {
  const pad = document.createElement('div');
  pad.className = 'mobileclip-map';
  pad.tabIndex = 0;
  pad.setAttribute('role', 'application');
  pad.setAttribute('aria-label', 'Embedding map. ' + HELP);
  const picture = document.createElement('div');
  const overlay = document.createElementNS(SVG, 'svg');
  const lasso = document.createElementNS(SVG, 'polygon');
  overlay.append(lasso);
  pad.append(picture, overlay);
  const help = document.createElement('p');
  help.className = 'mobileclip-map-help';
  help.textContent = HELP;
  el.append(pad, help);

  function show() {
    picture.innerHTML = model.get('value');
    picture.style.transform = '';
  }

  let waiting = null;
  let wanted = null;

  // Several moves within a moment are one message.
  function move(x, y, zoom) {
    wanted = [clamp(x, 0, 1), clamp(y, 0, 1), clamp(zoom, 0, MOST_ZOOM)];
    if (waiting) return;
    waiting = setTimeout(() => {
      waiting = null;
      const isSame = wanted.every((value, i) => value === model.get('view')[i]);
      model.set('view', wanted);
      wanted = null;
      if (isSame) return show();
      model.save_changes();
    }, 30);
  }

  function seen() {
    return wanted ?? model.get('view');
  }

  function pan(right, up) {
    const [x, y, zoom] = seen();
    const span = 2 ** -zoom;
    move(x + right * span, y + up * span, zoom);
  }

  function zoomBy(step, at = [0.5, 0.5]) {
    const [x, y, zoom] = seen();
    const now = clamp(zoom + step, 0, MOST_ZOOM);
    const change = 2 ** -zoom - 2 ** -now;
    move(x + (at[0] - 0.5) * change, y + (at[1] - 0.5) * change, now);
  }

  function enter() {
    model.set('entered', model.get('entered') + 1);
    model.save_changes();
  }

  const keys = {
    ArrowLeft: () => pan(-0.1, 0),
    ArrowRight: () => pan(0.1, 0),
    ArrowUp: () => pan(0, 0.1),
    ArrowDown: () => pan(0, -0.1),
    '+': () => zoomBy(0.5),
    '=': () => zoomBy(0.5),
    '-': () => zoomBy(-0.5),
    0: () => move(0.5, 0.5, 0),
    Enter: enter,
  };
  pad.addEventListener('keydown', (event) => {
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });

  pad.addEventListener(
    'wheel',
    (event) => {
      if (document.activeElement !== pad) return; // the page scrolls until the map has the focus
      event.preventDefault();
      zoomBy(event.deltaY < 0 ? 0.5 : -0.5, placeOf(event, pad, model.get('plot')));
    },
    { passive: false },
  );

  let drag = null;
  pad.addEventListener('pointerdown', (event) => {
    pad.focus({ preventScroll: true });
    pad.setPointerCapture(event.pointerId);
    drag = { from: [event.clientX, event.clientY], lasso: event.shiftKey, corners: [], line: [] };
  });
  pad.addEventListener('pointermove', (event) => {
    if (!drag) return;
    if (!drag.lasso) {
      const [x, y] = drag.from;
      picture.style.transform = `translate(${event.clientX - x}px, ${event.clientY - y}px)`;
      return;
    }
    const rect = pad.getBoundingClientRect();
    const [right, up] = placeOf(event, pad, model.get('plot'));
    const [x, y, zoom] = seen();
    const span = 2 ** -zoom;
    drag.corners.push([x + (right - 0.5) * span, y + (up - 0.5) * span]);
    drag.line.push(`${event.clientX - rect.left},${event.clientY - rect.top}`);
    lasso.setAttribute('points', drag.line.join(' '));
  });
  pad.addEventListener('pointerup', (event) => {
    if (!drag) return;
    const { from, corners } = drag;
    const isLasso = drag.lasso;
    drag = null;
    lasso.setAttribute('points', '');
    if (isLasso) {
      if (corners.length > 2) {
        model.set('polygon', corners);
        model.save_changes();
      }
      return;
    }
    const [, , width, height, whole] = model.get('plot');
    const scale = pad.getBoundingClientRect().width / whole;
    const right = (event.clientX - from[0]) / (width * scale);
    const up = (from[1] - event.clientY) / (height * scale);
    if (right || up) pan(-right, -up);
  });
  pad.addEventListener('pointercancel', () => {
    drag = null;
    lasso.setAttribute('points', '');
    show();
  });

  model.on('change:value', show);
  show();
  return () => model.off('change:value', show);
}

export default { render };
