"use strict";

SwaggerUIBundle({
  url: "docs.json",
  dom_id: "#reference",
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  tryItOutEnabled: true,
  validatorUrl: null, // else the document would be sent to a host of Swagger's
});
